from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neo_export.checkpoint.config import GELU_TANH_NAMES, parse_config, read_config
from neo_runtime.errors import CheckpointError
from transformers import GPTNeoConfig
from transformers.activations import ACT2CLS, ACT2FN

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

token_id = st.integers(0, 60000)


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid `config.json`, any of its keys left out."""
    num_heads = draw(st.integers(1, 9))
    repeats = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(["global", "local"]), min_size=1, max_size=4))
    raw: dict[str, Any] = {}
    if draw(st.booleans()):
        raw |= {"num_heads": num_heads, "hidden_size": num_heads * draw(st.integers(1, 64))}
    if draw(st.booleans()):
        raw["attention_types"] = [[kinds, repeats], [["global"], 1]]
        raw["num_layers"] = len(kinds) * repeats + 1
        if draw(st.booleans()):
            raw["attention_layers"] = draw(
                st.lists(
                    st.sampled_from(["global", "local"]),
                    min_size=raw["num_layers"],
                    max_size=raw["num_layers"],
                )
            )
    optional: dict[str, st.SearchStrategy[Any]] = {
        "vocab_size": st.integers(1, 60000),
        "max_position_embeddings": st.integers(1, 4096),
        "intermediate_size": st.none() | st.integers(1, 9000),
        "window_size": st.integers(1, 1000),
        "layer_norm_epsilon": st.floats(1e-12, 1e-2),
        "bos_token_id": st.none() | token_id,
        "eos_token_id": st.none() | token_id | st.lists(token_id, max_size=3),
        "pad_token_id": st.none() | token_id,
        "tie_word_embeddings": st.booleans(),
    }
    for key, values in optional.items():
        if draw(st.booleans()):
            raw[key] = draw(values)
    return raw | {"model_type": "gpt_neo"}


@settings(max_examples=200, deadline=None)
@given(raw_configs())
def test_means_what_it_means_to_transformers(raw: dict[str, Any]) -> None:
    theirs = GPTNeoConfig.from_dict(json.loads(json.dumps(raw)))
    ours = parse_config(raw)
    for key in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "max_position_embeddings",
        "window_size",
        "layer_norm_epsilon",
        "activation_function",
        "tie_word_embeddings",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    if theirs.window_size < theirs.max_position_embeddings:
        assert list(ours.attention_layers) == theirs.attention_layers
    else:  # nothing ever leaves the window
        assert ours.attention_layers == ("global",) * theirs.num_layers
    eos = theirs.eos_token_id
    assert list(ours.eos_token_id) == (
        [] if eos is None else eos if isinstance(eos, list) else [eos]
    )
    # As GPTNeoMLP and GPTNeoSelfAttention take them from the configuration.
    assert ours.intermediate_size == theirs.intermediate_size or (
        theirs.intermediate_size is None and ours.intermediate_size == 4 * theirs.hidden_size
    )
    assert ours.head_dim * theirs.num_heads == theirs.hidden_size


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    GPTNeoConfig(
        num_layers=3, attention_types=[[["local", "global"], 1], [["local"], 1]], hidden_size=48
    ).save_pretrained(tmp_path)
    spec = read_config(tmp_path)
    assert spec.attention_layers == ("local", "global", "local")
    assert (spec.hidden_size, spec.head_dim, spec.intermediate_size) == (48, 3, 192)


def test_other_names_of_the_same_value() -> None:
    raw = {"num_attention_heads": 4, "num_hidden_layers": 2, "attention_layers": ["local"] * 2}
    theirs = GPTNeoConfig.from_dict({**raw, "attention_types": [[["local"], 2]]})
    ours = _parse(**raw)
    assert (ours.num_heads, ours.num_layers) == (theirs.num_heads, theirs.num_layers) == (4, 2)
    with pytest.raises(CheckpointError, match="num_attention_heads is 4 and num_heads is 8"):
        _parse(num_attention_heads=4, num_heads=8)


def test_accepts_the_activations_that_are_the_same_function_and_no_other() -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    reference = ACT2FN["gelu_new"](x)
    names = set(ACT2CLS) - {"xielu"}  # which warns that a GPU library is missing
    same = {
        n
        for n in names
        if torch.allclose(ACT2FN[n].to(torch.float64)(x), reference, rtol=0, atol=1e-9)
    }
    assert same == GELU_TANH_NAMES & names
    for name in same:
        assert _parse(activation_function=name).activation_function == "gelu_new"
    for name in names - same:
        with pytest.raises(CheckpointError, match=r"activation_function is .*expected 'gelu_new'"):
            _parse(activation_function=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'gpt_neo'"),
        ({"model_type": None}, "model_type is None, expected 'gpt_neo'"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config.*original"),
        ({"hidden_size": 100, "num_heads": 16}, "hidden_size is 100.*multiple of num_heads.*16"),
        ({"hidden_size": "2048"}, "hidden_size is '2048', expected a whole number"),
        ({"hidden_size": None}, "hidden_size is None, expected a whole number"),
        ({"hidden_size": 2048.0}, "hidden_size is 2048.0, expected a whole number"),
        ({"num_layers": True}, "num_layers is True, expected a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a whole number of at least 1"),
        ({"window_size": -1}, "window_size is -1"),
        ({"max_position_embeddings": [2048]}, "max_position_embeddings is"),
        ({"intermediate_size": 0}, "intermediate_size is 0.*or null"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5', expected a positive"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ({"eos_token_id": "50256"}, "eos_token_id is '50256'.*list of token ids"),
        ({"eos_token_id": [1, None]}, "eos_token_id is"),
        ({"bos_token_id": False}, "bos_token_id is False"),
        ({"pad_token_id": 1.5}, "pad_token_id is 1.5"),
        ({"activation_function": None}, "activation_function is None"),
        ({"num_layers": 23}, "attention_types describes 24 layers and num_layers is 23"),
        ({"num_layers": 2, "attention_layers": ["global"]}, "attention_layers describes 1 layers"),
        ({"num_layers": 1, "attention_layers": ["sliding"]}, "only 'global' and 'local'"),
        ({"num_layers": 1, "attention_layers": [["global"]]}, "only 'global' and 'local'"),
        ({"attention_layers": "global"}, "attention_layers is 'global'"),
        ({"attention_types": ["global"]}, r"attention_types is \['global'\], expected a list"),
        ({"attention_types": [["global", 24]]}, "attention_types is"),
        ({"attention_types": {"global": 24}}, "attention_types is"),
        ({"attention_types": [[["global"], "24"]]}, "attention_types is"),
        ({"attention_types": [[["globe"], 24]]}, "only 'global' and 'local'"),
        ({"attention_types": [[["global"], 10**12]]}, "a sane number of layers"),
    ],
)
def test_what_gpt_neo_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        _parse(**change)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "config.json is not valid JSON.*download complete"),
        (b"[]", "config.json holds a JSON list, expected an object"),
        (b"\xff\xfe{", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"{}", "model_type is None"),
        (None, "has no config.json; expected a Hugging Face model folder"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


def _parse(**change: Any) -> ModelSpec:
    return parse_config({"model_type": "gpt_neo"} | change)
