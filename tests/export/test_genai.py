"""The bundle under onnxruntime-genai: the same tokens as PyTorch, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.hf_reference import heldout_texts, reference_continuations, varied_prompts
from helpers.int8_cache import calibrated
from helpers.models import DEMO, TinyConfig, make_checkpoint
from neo_export.bundle.genai import genai_config
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.passes.fuse_attention import GUARD_NODE
from neo_runtime.bundle.manifest import CacheSpec
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # both libraries look for it when they start
og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

NEW_TOKENS = 110
"""Past the window of 64 from any prompt."""
CACHE = CacheSpec(layout="append", padding="left", dtype="float32", window=None)

Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def cpu(mini_bundle: Path) -> Any:
    return og.Model(str(mini_bundle))


@pytest.fixture(scope="module")
def portable(portable_bundle: Path) -> Any:
    return og.Model(str(portable_bundle))


@pytest.fixture(params=["cpu", "portable"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), TinyConfig())
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.spec


def start(model: Any, prompts: Sequence[Sequence[int]], length: int = 300) -> Any:
    """A greedy generator that has read the prompts, all of one length; the end token is banned."""
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    return generator


def take(generator: Any, count: int) -> None:
    for _ in range(count):
        generator.generate_next_token()


def text(generator: Any) -> list[int]:
    ids: list[int] = generator.get_sequence(0).tolist()
    return ids


def continuations(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS
) -> list[Ids]:
    generator = start(model, prompts, len(prompts[0]) + new_tokens)
    while not generator.is_done():
        generator.generate_next_token()
    return [tuple(generator.get_sequence(i)[len(p) :].tolist()) for i, p in enumerate(prompts)]


def expected(prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> list[Ids]:
    """PyTorch's, the end token banned too."""
    return [_expected(tuple(prompt), new_tokens) for prompt in prompts]


@functools.cache
def _expected(prompt: Ids, new_tokens: int) -> Ids:
    [[found]] = reference_continuations(
        [prompt], do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
    )
    return found


def test_greedy_tokens_are_pytorchs(model: Any) -> None:
    # The empty text and a prompt that ends in padding among them: the end token is both here.
    prompts = [[0], [*varied_prompts(1)[0][:20], 0], *varied_prompts(4)]
    assert [continuations(model, [prompt])[0] for prompt in prompts] == expected(prompts)


def test_greedy_tokens_to_the_last_position(cpu: Any) -> None:
    prompt = [token for part in varied_prompts(10) for token in part][:440]
    assert continuations(cpu, [prompt], 72) == expected([prompt], 72)


def test_head_size_without_fused_attention(tmp_path: Path) -> None:
    """On the target cpu, but with a cache that grows: the option must not say otherwise."""
    from transformers import GPTNeoForCausalLM

    config = TinyConfig(head_dim=12, num_heads=3, vocab_size=11)
    folder = make_checkpoint(tmp_path / "checkpoint", config)
    export_bundle(str(folder), tmp_path / "bundle", ExportOptions(target="cpu"))
    found = continuations(og.Model(str(tmp_path / "bundle")), [[3, 1, 4]], 30)
    module = GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert found == greedy(module, [3, 1, 4], 30)


def test_int8_cache(tmp_path: Path) -> None:
    """The tokens of our own runtime, past the window, and again from a position before it."""
    import neo_runtime

    prompt = varied_prompts(1)[0][:20]
    statistics = calibrated(DEMO, np.array([varied_prompts(20)[-1]]), tmp_path / "statistics")
    options = ExportOptions(kv_cache="int8", calibration=statistics)
    export_bundle(str(DEMO), tmp_path / "bundle", options)
    with neo_runtime.load(tmp_path / "bundle", threads=1) as runtime:
        own = runtime.generate(
            prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        ).token_ids
    loaded = og.Model(str(tmp_path / "bundle"))
    assert continuations(loaded, [prompt]) == [tuple(own)]
    generator = start(loaded, [prompt], len(prompt) + NEW_TOKENS)
    take(generator, NEW_TOKENS - 1)
    generator.rewind_to(len(prompt) + 10)
    generator.append_tokens(np.array([own[10:12]], dtype=np.int32))
    take(generator, 20)
    assert text(generator)[len(prompt) :] == list(own[:32])


def greedy(module: Any, prompt: list[int], count: int) -> list[Ids]:
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        rows = module.generate(
            ids, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
        )
    return [tuple(rows[0, len(prompt) :].tolist())]


def test_ends_at_the_end_token(mini_bundle: Path) -> None:
    """The library leaves the end token itself out of the sequence, `generate` keeps it."""
    prompt = varied_prompts(2)[1]
    full = expected([prompt])[0]
    end = full[40]
    config = og.Config(str(mini_bundle))
    config.overlay(json.dumps({"model": {"eos_token_id": end}}))
    model = og.Model(config)
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answer = text(generator)
    assert answer == prompt + list(full[: full.index(end)])
    # Every token so far is in the cache, so that a next turn can follow at once.
    turn = varied_prompts(4)[3]
    generator.append_tokens(np.array([turn], dtype=np.int32))
    take(generator, 40)
    assert text(generator)[len(answer + turn) :] == list(expected([answer + turn], 40)[0])


def test_a_next_turn_after_stopping_midway(model: Any) -> None:
    first, turn = varied_prompts(4)[1], varied_prompts(4)[3]
    generator = start(model, [first])
    take(generator, 70)
    sofar = text(generator)
    generator.get_logits()  # puts the last token into the cache: the library would skip it
    generator.append_tokens(np.array([turn], dtype=np.int32))
    take(generator, 70)
    assert text(generator)[len(sofar + turn) :] == list(expected([sofar + turn], 70)[0])


def test_rewinding(model: Any) -> None:
    first, turn = varied_prompts(4)[2], varied_prompts(4)[1]
    generator = start(model, [first])
    take(generator, 20)
    generator.rewind_to(len(first) - 40)
    generator.append_tokens(np.array([turn], dtype=np.int32))
    take(generator, 70)
    assert text(generator) == [
        *first[:-40],
        *turn,
        *expected([first[:-40] + turn], 70)[0],
    ]


def test_a_batch_of_one_length_equals_each_alone(model: Any) -> None:
    prompts = [prompt[:30] for prompt in varied_prompts(5) if len(prompt) >= 30]
    assert continuations(model, prompts, 60) == expected(prompts, 60)


def test_beams_that_do_not_end_are_pytorchs(portable: Any) -> None:
    prompt = varied_prompts(4)[3]
    params = og.GeneratorParams(portable)
    length = len(prompt) + 60
    params.set_search_options(max_length=length, min_length=length, num_beams=4)
    generator = og.Generator(portable, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    [[found]] = reference_continuations(
        [prompt], do_sample=False, num_beams=4, max_new_tokens=60, min_new_tokens=60
    )
    assert text(generator)[len(prompt) :] == list(found)
    assert found != expected([prompt], 60)[0]


def test_a_ragged_batch_is_refused(cpu: Any) -> None:
    """The library would continue it with a hole in the mask, which fused attention cannot honour.

    Where local layers keep only their window the operator refuses the padded prompt before that.
    """
    long, short = varied_prompts(4)[3], varied_prompts(4)[1]
    padded = short + [0] * (len(long) - len(short))
    with pytest.raises(RuntimeError, match=f"{GUARD_NODE}|seqlens_k"):
        continuations(cpu, [long, padded])


def test_a_next_turn_of_a_batch_is_refused(model: Any) -> None:
    prompts = [varied_prompts(4)[3]] * 2
    generator = start(model, prompts)
    take(generator, 2)
    with pytest.raises(RuntimeError, match="only be called once for batch_size > 1"):
        generator.append_tokens(np.array(prompts, dtype=np.int32))


def test_more_positions_than_the_model_has_are_refused(model: Any) -> None:
    with pytest.raises(RuntimeError, match=r"max_length \(513\).*context_length \(512\)"):
        start(model, [[1]], 513)
    with pytest.raises(RuntimeError, match=r"exceeds max length \(512\)"):
        start(model, [[1] * 513], 512)


def test_the_tokenizer_is_ours(cpu: Any, mini_bundle: Path) -> None:
    theirs, ours = og.Tokenizer(cpu), Tokenizer.from_file(str(mini_bundle / "tokenizer.json"))
    texts = [*heldout_texts()[:50], " été\n\n\tnaïve ☕ 日本  ", "don't 12345<|endoftext|>Hi", ""]
    for sample in texts:
        ids = ours.encode(sample).ids
        assert theirs.encode(sample).tolist() == ids
        assert theirs.decode(np.array(ids, dtype=np.int32)) == ours.decode(ids)


def test_generation_defaults_are_taken_over(spec: ModelSpec) -> None:
    given = {"do_sample": True, "temperature": 1, "top_k": 1000, "top_p": None, "num_beams": 2}
    search = genai_config(spec, CACHE, 40, given)["search"]
    assert search["do_sample"] is True
    assert (search["temperature"], search["num_beams"]) == (1.0, 2)
    assert search["top_k"] == spec.vocab_size
    assert search["top_p"] == 1.0
    assert search["early_stopping"] is False
    assert search["max_length"] == 40


@pytest.mark.parametrize(
    ("eos", "pad", "generation", "want"),
    [
        ((0,), None, {}, ([0], 0)),
        ((3, 50256), 7, {}, ([3], 7)),
        ((3,), 50256, {}, ([3], 3)),
        ((3,), None, {"eos_token_id": [4, 5], "pad_token_id": 6}, ([4, 5], 6)),
        ((3,), None, {"eos_token_id": 5}, ([5], 5)),
        ((50256,), None, {}, ([60], 60)),
        ((), 7, {}, ([7], 7)),
    ],
)
def test_end_and_padding_tokens(
    spec: ModelSpec,
    eos: Ids,
    pad: int | None,
    generation: dict[str, Any],
    want: tuple[list[int], int],
) -> None:
    changed = dataclasses.replace(spec, eos_token_id=eos, pad_token_id=pad)
    model = genai_config(changed, CACHE, 40, generation)["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == want
