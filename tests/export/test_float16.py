"""Half precision: onnxruntime's float16 graphs, and the same graphs in real half arithmetic.

Where onnxruntime has no half-precision kernel it computes in float32 behind casts, which proves
nothing about overflow. So the portable graphs also run in ONNX's reference evaluator (numpy
float16, the statistics of norms included: rougher than any engine), with PyTorch's own float16
beside it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers.half_arithmetic import evaluate
from helpers.models import DEMO, ODD_CONFIGS, Reference, TinyConfig, make_checkpoint, random_ids
from helpers.running import Graphs, assert_agrees, relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.passes.float16 import to_float16
from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import CheckpointError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

LIMIT = TOLERANCES["fp16"].logits
TARGETS = ("cpu", "cuda", "portable")
UNFUSED = ("head_size_12",)
"""Heads that CUDA's attention does not take."""


@dataclass(frozen=True)
class Halves:
    """One model in float16 for all targets, and what it should give."""

    bundles: dict[str, Path]
    reference: Reference
    ids: NDArray[np.int64]
    """[1, S]"""
    logits: NDArray[np.float32]
    """[1, S, V], float32 PyTorch."""


def _export(checkpoint: Path, folder: Path, targets: tuple[str, ...] = TARGETS) -> dict[str, Path]:
    for target in targets:
        options = ExportOptions(target=target, precision="fp16")
        export_bundle(str(checkpoint), folder / target, options)
    return {target: folder / target for target in targets}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Halves:
    """The demo model on a text of its kind."""
    bundles = _export(DEMO, tmp_path_factory.mktemp("demo-half"))
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    with (DEMO / "heldout.jsonl").open(encoding="utf-8") as lines:
        text = "".join(json.loads(next(lines))["text"] for _ in range(5))
    ids = np.array([tokenizer.encode(text).ids[:512]])
    assert ids.shape == (1, 512)
    return Halves(bundles, reference, ids, reference.logits(ids))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Halves]:
    """A random model, by the name of its configuration."""

    @functools.cache
    def make(name: str) -> Halves:
        folder, config = tmp_path_factory.mktemp(name), ODD_CONFIGS[name]
        reference = Reference(make_checkpoint(folder / "checkpoint", config))
        ids = random_ids(config, 1, config.max_position_embeddings)
        targets = tuple(t for t in TARGETS if t != "cuda" or name not in UNFUSED)
        bundles = _export(folder / "checkpoint", folder, targets)
        return Halves(bundles, reference, ids, reference.logits(ids))

    return make


TINY = ("plain", "untied_head", "head_size_12", "head_size_80", "window_4")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in ("demo", *TINY)
        for target in TARGETS
        if target != "cuda" or name not in UNFUSED
    ],
)
def test_onnxruntime(name: str, target: str, demo: Halves, tiny: Callable[[str], Halves]) -> None:
    halves = demo if name == "demo" else tiny(name)
    graphs = Graphs(halves.bundles[target])
    end = halves.ids.shape[1]
    assert_agrees(graphs.run("score", halves.ids), halves.logits, LIMIT)
    cache = graphs.cache()
    assert all(tensor.dtype == np.float16 for tensor in cache.tensors.values())
    prompt = end - 12
    found = [graphs.run("prefill", halves.ids[:, : prompt - 5], cache)]
    assert_agrees(found[0], halves.logits[:, prompt - 6 : prompt - 5], LIMIT)
    found = [graphs.run("prefill", halves.ids[:, prompt - 5 : prompt], cache)]
    found += [graphs.run("decode", halves.ids[:, n : n + 1], cache) for n in range(prompt, end)]
    assert all(logits.dtype == np.float32 for logits in found)
    assert_agrees(np.concatenate(found, axis=1), halves.logits[:, prompt - 1 :], LIMIT)


@pytest.mark.parametrize(("name", "length"), [("demo", 70), *((name, 40) for name in TINY)])
def test_real_half_arithmetic(
    name: str, length: int, demo: Halves, tiny: Callable[[str], Halves]
) -> None:
    halves = demo if name == "demo" else tiny(name)
    ids, bundle = halves.ids[:, :length], halves.bundles["portable"]
    outputs = evaluate(bundle / "score.onnx", ids)
    assert outputs["logits"].dtype == np.float32
    assert outputs["present.0.key"].dtype == np.float16
    assert_agrees(outputs["logits"], halves.logits[:, :length], LIMIT)
    # PyTorch's half arithmetic is about as far off: the error is float16's, not the graph's.
    half = halves.reference.half_logits(ids)
    error = relative_l2(half, halves.logits[:, :length]).max()
    assert 1e-4 < error <= LIMIT
    assert relative_l2(outputs["logits"], half).max() <= 2 * LIMIT


def test_real_half_arithmetic_of_prefill(tiny: Callable[[str], Halves]) -> None:
    halves = tiny("plain")
    for length in (7, 8, 9, 40):
        found = evaluate(halves.bundles["portable"] / "prefill.onnx", halves.ids[:, :length])
        assert_agrees(found["logits"], halves.logits[:, length - 1 : length], LIMIT)


def test_scores_beyond_half_precision(tmp_path: Path) -> None:
    """Unscaled scores pass 65504 while queries and keys are small: they must be float32."""
    config = TinyConfig(head_dim=64, num_heads=1, attention_layers=("global",))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    tensors = load_file(checkpoint / "model.safetensors")
    for part in ("q_proj", "k_proj"):
        tensors[f"transformer.h.0.attn.attention.{part}.weight"] *= 300.0
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    reference = Reference(checkpoint)
    ids = random_ids(config, 1, 40)
    with np.errstate(over="ignore"):
        assert np.isinf(_scores(reference, ids).astype(np.float16)).any()
    bundles = _export(checkpoint, tmp_path)
    expected = reference.logits(ids)
    found = evaluate(bundles["portable"] / "score.onnx", ids)["logits"]
    # Attention picks one position each; where two scores lie closer than half precision resolves
    # the queries, it may pick another, so not every position can be held to the limit.
    assert np.isfinite(found).all()
    assert np.median(relative_l2(found, expected)) <= LIMIT
    for bundle in bundles.values():
        found = Graphs(bundle).run("score", ids)
        assert np.isfinite(found).all()
        assert np.median(relative_l2(found, expected)) <= LIMIT


def _scores(reference: Reference, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Queries times keys of layer 0, as PyTorch has them."""
    seen: dict[str, Any] = {}
    attention = reference.model.transformer.h[0].attn.attention
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.__setitem__(name, output[0].numpy())
        )
        for name in ("q_proj", "k_proj")
    ]
    reference.logits(ids)
    for handle in handles:
        handle.remove()
    scores: NDArray[np.float32] = seen["q_proj"] @ seen["k_proj"].T
    return scores


def test_types_inside_the_portable_graph(tiny: Callable[[str], Halves]) -> None:
    """float32 from the casts of queries and keys to the softmax, and for logits; else float16."""
    path = tiny("untied_head").bundles["portable"] / "score.onnx"
    model = onnx.shape_inference.infer_shapes(
        onnx.load(str(path), load_external_data=False), check_type=True, strict_mode=True
    )
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    wide = {
        (node.op_type, types[name])
        for node in graph.node
        for name in node.output
        if types.get(name) in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    }
    full = {name for name, kind in wide if kind == onnx.TensorProto.FLOAT}
    assert full == {"Cast", "Transpose", "MatMul", "Where", "Softmax"}
    softmax = [node for node in graph.node if node.op_type == "Softmax"]
    scores = [node for node in graph.node if node.op_type == "Where"]
    for node in (*softmax, *scores):
        assert types[node.output[0]] == onnx.TensorProto.FLOAT
    products = [types[n.output[0]] for n in graph.node if n.op_type == "MatMul"]
    assert products.count(onnx.TensorProto.FLOAT) == len(softmax)
    stored = {i.data_type for i in graph.initializer if i.data_location == i.EXTERNAL}
    assert stored == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("target", TARGETS)
def test_weights_take_half_the_bytes(
    target: str, demo: Halves, request: pytest.FixtureRequest
) -> None:
    fixture = "portable_bundle" if target == "portable" else "mini_bundle"
    full = request.getfixturevalue(fixture) / "weights.bin"
    half = demo.bundles[target] / "weights.bin"
    assert 0.49 < half.stat().st_size / full.stat().st_size < 0.51


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_weight_beyond_half_precision_is_an_error(sign: float, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TinyConfig())
    tensors = load_file(checkpoint / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name][3, 5] = sign * 70000.0
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    for target in TARGETS:
        options = ExportOptions(target=target, precision="fp16")
        with pytest.raises(CheckpointError, match=rf"{name}.*70000.*65504.*--fp32"):
            export_bundle(str(checkpoint), tmp_path / target, options)
        assert not (tmp_path / target).exists()
        if target != "cuda":  # which has no float32
            options = ExportOptions(target=target)
            export_bundle(str(checkpoint), tmp_path / f"{target}-fp32", options)


def test_rounding_is_to_nearest_even_and_never_clips() -> None:
    largest = np.array([65504.0, -65504.0, 65519.99], dtype=np.float32)
    assert to_float16(largest, "w").tolist() == [65504.0, -65504.0, 65504.0]
    ties = np.array([2049.0, 2051.0, -2049.0], dtype=np.float32)
    assert to_float16(ties, "w").tolist() == [2048.0, 2052.0, -2048.0]
    for value in (65520.0, -65520.0, 1e30):
        with pytest.raises(CheckpointError, match="w holds"):
            to_float16(np.array([1.0, value], dtype=np.float32), "w")
