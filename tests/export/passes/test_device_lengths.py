"""Lengths that a GPU can replay. What masks they honour: `tests/export/test_mask_guard.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers.graphs import (
    apply_pass,
    assert_same_outputs,
    bound_graph,
    operators,
    passes_of,
    situations,
    spec_of,
)
from helpers.models import TinyConfig
from helpers.placement import copies
from helpers.running import Graphs
from neo_export.bundle.weights import bind_parameters
from neo_export.gpt_neo.graphs import build_graph
from neo_export.passes.device_lengths import device_lengths
from neo_export.passes.fuse_attention import GUARD_NODE, fuse_attention

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

CONFIG = TinyConfig()


def as_proto(model: ir.Model) -> Any:
    """The nodes and the names of the initializers, as `onnx.GraphProto` has them."""
    nodes = [
        SimpleNamespace(
            op_type=node.op_type,
            name=node.name,
            input=["" if value is None else value.name for value in node.inputs],
            output=[value.name for value in node.outputs],
        )
        for node in model.graph
    ]
    names = [SimpleNamespace(name=name) for name in model.graph.initializers]
    return SimpleNamespace(node=nodes, initializer=names)


@pytest.mark.parametrize("graph", ["prefill", "decode", "score"])
def test_the_same_outputs(graph: str) -> None:
    before, after = bound_graph(graph, CONFIG), bound_graph(graph, CONFIG)
    assert apply_pass(fuse_attention, before) == apply_pass(fuse_attention, after) == 2
    assert apply_pass(device_lengths, after) == 2
    assert_same_outputs(before, after, situations(graph, CONFIG), 0.0)


def test_it_needs_fused_attention() -> None:
    model = bound_graph("decode", CONFIG)
    count = operators(model)
    assert apply_pass(device_lengths, model) == 0
    assert operators(model) == count


def test_the_decode_graph_can_be_captured(cuda_bundle: Path, mini_bundle: Path) -> None:
    def graph(bundle: Path, name: str) -> onnx.GraphProto:
        return onnx.load(str(bundle / f"{name}.onnx"), load_external_data=False).graph

    assert copies(graph(cuda_bundle, "decode")) == []
    # The check can fail: the CPU's guard compares lengths with shapes, and so do chunks.
    assert copies(graph(mini_bundle, "decode"))
    assert copies(graph(cuda_bundle, "prefill"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_every_precision_can_be_captured(precision: str) -> None:
    """The published 1.3B shape, its head tied; graphs have no data before it is written."""
    config = TinyConfig(
        vocab_size=50257,
        num_heads=16,
        head_dim=128,
        attention_layers=("global", "local") * 12,
        window_size=256,
        max_position_embeddings=2048,
    )
    spec = spec_of(config)
    model = build_graph("decode", spec)
    bind_parameters(model, lambda name: pytest.fail(f"{name} was read"))
    for rewrite in passes_of("cuda", precision, "decode", spec):
        apply_pass(rewrite, model)
    assert operators(model)["GroupQueryAttention"] == 24
    assert copies(as_proto(model)) == []


def test_a_mask_narrower_than_the_new_tokens_fails_on_the_host(cuda_bundle: Path) -> None:
    graphs = Graphs(cuda_bundle)
    with pytest.raises(Exception, match=GUARD_NODE):
        graphs.run("prefill", np.ones((1, 4), np.int64), attention_mask=np.ones((1, 3), np.int64))


def test_only_the_broken_row_becomes_nan(cuda_bundle: Path) -> None:
    graphs = Graphs(cuda_bundle)
    ids = np.arange(8).reshape(2, 4)
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    logits = graphs.run("prefill", ids, attention_mask=mask)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()
    cache = graphs.cache(batch=2, length=8)
    graphs.run("prefill", ids, cache)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0]])
    logits = graphs.run("decode", ids[:, :1], cache, attention_mask=mask)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()
