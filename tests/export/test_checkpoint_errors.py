"""Bad checkpoints: each its own error, which names what is wrong and what to do."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from neo_export.checkpoint.folder import open_checkpoint
from neo_runtime.errors import CheckpointError, DependencyError
from safetensors.torch import load_file, save_file
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_export.checkpoint.whole import Checkpoint

    State = dict[str, torch.Tensor]

WTE = "transformer.wte.weight"
Q_PROJ = "transformer.h.0.attn.attention.q_proj.weight"


def make_config(**change: Any) -> GPTNeoConfig:
    values: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 2,
        "max_position_embeddings": 8,
    }
    return GPTNeoConfig(**(values | change))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint in one safetensors file, to be spoiled."""
    GPTNeoForCausalLM(make_config()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in shards, to be spoiled."""
    GPTNeoForCausalLM(make_config()).save_pretrained(tmp_path, max_shard_size="5KB")
    return tmp_path


def edit_state(folder: Path, edit: Callable[[State], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


def edit_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def check_finite(checkpoint: Checkpoint) -> None:
    for tensor in checkpoint.tensors.values():
        tensor.check_finite()


def fails(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop(Q_PROJ), f"tensor '{Q_PROJ}' is missing; is the download complete"),
        (lambda s: (s.pop(Q_PROJ), s.pop(WTE)), f"'{WTE}' is missing .and 1 more."),
        (
            lambda s: s.update({Q_PROJ: torch.zeros(16, 8)}),
            rf"'{Q_PROJ}' has shape \[16, 8\], expected \[16, 16\]; is the config.json",
        ),
        (
            lambda s: s.update({WTE: torch.zeros(23, 16)}),
            r"shape \[23, 16\], expected \[20, 16\]; the table has 23 rows.*vocab_size 20.*resized",
        ),
        (
            lambda s: s.update({Q_PROJ: s[Q_PROJ].double()}),
            "type float64, expected one of float32, float16, bfloat16",
        ),
        (lambda s: s.update({Q_PROJ: s[Q_PROJ].to(torch.int8)}), "type int8, expected one of"),
        (
            lambda s: s.update({Q_PROJ: s[Q_PROJ].to(torch.float8_e4m3fn)}),
            "type F8_E4M3, expected one of",
        ),
        (
            lambda s: s.update({"lm_head.weight": s[WTE] + 1}),
            "tie_word_embeddings, but 'lm_head.weight' differs.*set .* to false",
        ),
        (
            lambda s: s.update({"lm_head.weight": torch.zeros(4, 16)}),
            r"'lm_head.weight' has shape \[4, 16\]",
        ),
        (lambda s: s.update({"lm_head.bias": torch.zeros(20)}), "unexpected tensor 'lm_head.bias'"),
        (
            lambda s: s.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}),
            "unexpected tensor 'transformer.h.2.ln_1.bias'; config.json describes .* 2 layers",
        ),
        (
            lambda s: s.update({"wte.weight": s[WTE].clone()}),
            "both 'transformer.wte.weight' and 'wte.weight'",
        ),
        (
            lambda s: s.update({f"{Q_PROJ[:-7]}.lora_A.weight": torch.zeros(2, 16)}),
            "lora_A.weight' belongs to a LoRA adapter; merge it.*merge_and_unload",
        ),
        (
            lambda s: s.update({f"{Q_PROJ}.absmax": torch.zeros(2)}),
            "absmax' belongs to an already quantized checkpoint",
        ),
    ],
)
def test_wrong_tensors(folder: Path, edit: Callable[[State], Any], words: str) -> None:
    edit_state(folder, edit)
    fails(folder, words)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapped_model(folder: Path, prefix: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({prefix + k: v for k, v in state.items()}, folder / "model.safetensors")
    fails(folder, f"saved from a wrapped model; strip the prefix '{prefix}'")


def test_an_untied_model_without_a_head(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    fails(folder, "'lm_head.weight' is missing; config.json says tie_word_embeddings false")


@pytest.mark.parametrize(
    "kind",
    [GPTNeoForSequenceClassification, GPTNeoForTokenClassification, GPTNeoForQuestionAnswering],
)
def test_other_heads(tmp_path: Path, kind: Any) -> None:
    kind(make_config()).save_pretrained(tmp_path)
    fails(tmp_path, "classification or question-answering checkpoint, expected a causal language")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(folder: Path, dtype: torch.dtype) -> None:
    def spoil(state: State) -> None:
        for name in state:
            state[name] = state[name].to(dtype)
        state[Q_PROJ][3, 5] = float("nan")
        state[Q_PROJ][4, 0] = float("-inf")
        state[Q_PROJ][5, 1] = float("inf")

    edit_state(folder, spoil)
    with open_checkpoint(folder) as checkpoint:
        words = rf"'{Q_PROJ}' has 3 of 256 .*1 NaN, 2 infinite; the first at \[3, 5\]"
        with pytest.raises(CheckpointError, match=words):
            check_finite(checkpoint)


def test_a_value_that_is_not_finite_far_into_a_large_tensor(tmp_path: Path) -> None:
    model = GPTNeoForCausalLM(make_config(vocab_size=200_000))
    with torch.no_grad():
        model.transformer.wte.weight[150_000, 7] = torch.inf
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        words = r"1 of 3200000 values .*0 NaN, 1 infinite; the first at \[150000, 7\]"
        with pytest.raises(CheckpointError, match=words):
            check_finite(checkpoint)


def test_a_stored_head_that_differs_in_its_last_value(tmp_path: Path) -> None:
    model = GPTNeoForCausalLM(make_config(vocab_size=100_000))
    model.save_pretrained(tmp_path)

    def spoil(state: State) -> None:
        state["lm_head.weight"] = state[WTE].clone()
        state["lm_head.weight"][-1, -1] += 1

    edit_state(tmp_path, spoil)
    fails(tmp_path, "'lm_head.weight' differs")


def header(text: bytes, data: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole safetensors file: 0 bytes"),
        (b"\x01\x02", "not a whole safetensors file: 2 bytes"),
        (b"\xff" * 64, "not a whole safetensors file: 64 bytes, and its header claims 1844"),
        (struct.pack("<Q", 50) + b"{}", "not a whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
        (header(b"not json"), "header is damaged"),
        (header(b"[]"), "header is damaged .it holds a list"),
        (header(b"\xff\xff\xff"), "header is damaged"),
        (header(json.dumps({"a": 3}).encode()), "tensor 'a' is not an object"),
        (header(json.dumps({"a": entry(offsets=(0,))}).encode()), "'a' has data_offsets"),
        (header(json.dumps({"a": entry(offsets=(8, 0))}).encode(), 8), "'a' has data_offsets"),
        (header(json.dumps({"a": entry(shape=(-2,))}).encode(), 8), "'a' lacks a dtype, shape"),
        (header(json.dumps({"a": entry(dtype=4)}).encode(), 8), "'a' lacks a dtype, shape"),
        (header(json.dumps({"a": entry(shape=(3,))}).encode(), 8), "has 8 bytes, expected 12"),
        (header(json.dumps({"a": entry(shape=(1 << 62,))}).encode(), 8), "has 8 bytes, expected"),
        (header(json.dumps({"a": entry()}).encode(), 7), "truncated: 7 bytes of data.*8"),
        (header(json.dumps({"a": entry()}).encode(), 9), "longer than its header says"),
        (
            header(json.dumps({"a": entry(), "b": entry()}).encode(), 8),
            "'b' starts at 0, expected 8",
        ),
        (header(json.dumps({"a": entry(offsets=(8, 16))}).encode(), 16), "starts at 8, expected 0"),
    ],
)
def test_damaged_safetensors(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    fails(folder, words)


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    fails(folder, "model.safetensors is truncated: .*download or save it again")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("reached",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be loaded as PyTorch weights"),
        (b"PK\x03\x04 and no more", "cannot be loaded as PyTorch weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (pickle.dumps(Evil(), protocol=2), "cannot be loaded.*more than tensors.*run code"),
        ([torch.zeros(2)], "holds a list, expected a state dict"),
        ({"model": {"a": torch.zeros(2)}}, "entry 'model' is a dict, expected a tensor"),
        ({3: torch.zeros(2)}, "entry 3 is a Tensor"),
        ({WTE: torch.zeros(20, 16).to_sparse()}, f"'{WTE}' is sparse"),
        ({WTE: torch.zeros(20, 16)}, "'transformer.wpe.weight' is missing .and"),
    ],
)
def test_bad_torch_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: Any, words: str
) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    monkeypatch.chdir(folder)
    fails(folder, words)
    assert not (folder / "reached").exists()


def test_torch_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with open_checkpoint(folder) as checkpoint:  # safetensors need none
        check_finite(checkpoint)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DependencyError, match=r"torch is not installed.*'neo-onnx\[torch\]'"):
        open_checkpoint(folder)


INDEX = "model.safetensors.index.json"


def first_shard(sharded: Path) -> tuple[dict[str, str], str]:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    return weight_map, weight_map[WTE]


@pytest.mark.parametrize(
    "name",
    [
        "{parent}/outside.safetensors",
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "link/outside.safetensors",
        "bad\0.safetensors",
        "",
    ],
)
def test_an_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    GPTNeoForCausalLM(make_config()).save_pretrained(folder, max_shard_size="5KB")
    weight_map, shard = first_shard(folder)
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path)
    # The file is there and good: only its place is wrong.
    (folder / shard).rename(tmp_path / "outside.safetensors")
    name = name.format(parent=tmp_path)
    changed = {k: name if v == shard else v for k, v in weight_map.items()}
    edit_json(folder / INDEX, weight_map=changed)
    fails(folder, "is outside of the checkpoint's folder")


def test_shards_in_a_subfolder_are_inside(sharded: Path) -> None:
    weight_map, shard = first_shard(sharded)
    (sharded / "sub").mkdir()
    (sharded / shard).rename(sharded / "sub" / shard)
    changed = {k: f"./sub/{v}" if v == shard else v for k, v in weight_map.items()}
    edit_json(sharded / INDEX, weight_map=changed)
    with open_checkpoint(sharded) as checkpoint:
        check_finite(checkpoint)


def test_a_shard_that_is_missing(sharded: Path) -> None:
    _, shard = first_shard(sharded)
    (sharded / shard).unlink()
    fails(sharded, f"names 1 of .* shards that do not exist, the first '{shard}'.*complete")


def test_a_shard_without_the_tensor_it_should_have(sharded: Path) -> None:
    weight_map, shard = first_shard(sharded)
    other = next(name for name in weight_map.values() if name != shard)
    edit_json(sharded / INDEX, weight_map=weight_map | {WTE: other})
    fails(sharded, f"says that tensor '{WTE}' is in '{other}', and it is not there")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    weight_map, shard = first_shard(sharded)
    other = next(name for name in weight_map.values() if name != shard)
    state = load_file(sharded / other)
    save_file(state | {WTE: load_file(sharded / shard)[WTE]}, sharded / other)
    fails(sharded, f"tensor '{WTE}' is in .* and in another shard")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\x01", "index.json is not valid JSON"),
        (b"[]", "index.json holds a JSON list"),
        (b"{}", "no usable weight_map"),
        (b'{"weight_map": {}}', "no usable weight_map"),
        (b'{"weight_map": {"a": 3}}', "no usable weight_map"),
        (b'{"weight_map": {"a": "config.json"}}', "'config.json', expected a .safetensors file"),
    ],
)
def test_a_bad_index(sharded: Path, content: bytes, words: str) -> None:
    (sharded / INDEX).write_bytes(content)
    fails(sharded, words)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    fails(folder, "no weights that can be read: found tf_model.h5, expected one of model.safet")
    (folder / "tf_model.h5").rename(folder / "adapter_model.safetensors")
    fails(folder, r"LoRA adapter .* and no adapter_config\.json")


def test_weights_behind_a_broken_link(folder: Path) -> None:
    """As a copied folder of the hub's cache has them."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/5f3a")
    fails(folder, "model.safetensors is a link to ../../blobs/5f3a, which is not there")


def test_no_folder(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "is not a folder; expected a Hugging Face model folder")


def test_a_bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    fails(folder, "generation_config.json is not valid JSON")
