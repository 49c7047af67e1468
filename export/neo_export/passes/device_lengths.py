"""Sequence lengths and mask guard for a graph that a GPU runs and can replay as a CUDA graph.

    before (`fuse_attention`)                        after
    seqlens_k from the mask and from shapes,         seqlens_k only from the mask
    a guard that fails by an index out of bounds     a guard that makes the row's logits NaN

Two things are different on a GPU. A kernel raises no error: `Gather` reads 0 where an index is out
of bounds. And a CUDA graph replays kernels only: shapes are values on the host, and comparing one
with a value on the device takes a copy, which ends the capture. So the decode graph never combines
the mask's values with shapes; `total_sequence_length`, which the attention reads on the host, is
the mask's width and needs no values.

Shapes are checked on the host (the node `GUARD_NODE`), values on the device: if a row's mask is
not ones followed by zeros, its logits are NaN, which the samplers refuse. The lengths that the
attention gets stay within the buffers even then, so it writes nowhere else.

Must not fire where the attention was not fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from neo_export.passes._insert import insert_before
from neo_export.passes._tensors import logits_of
from neo_export.passes.fuse_attention import GUARD_NODE

if TYPE_CHECKING:
    from onnxscript import OpBuilder

__all__ = ["device_lengths"]

_SEQLENS_K, _TOTAL = 5, 6  # places among the operator's inputs


def device_lengths(model: ir.Model) -> int:
    """Apply to the whole model; returns how many attentions read the new lengths."""
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if not nodes:
        return 0
    inputs = {value.name: value for value in graph.inputs}
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for name in (GUARD_NODE, "seqlens_k", "total_sequence_length"):
        _rename_away(graph, name)
    seqlens, total, broken = insert_before(
        graph[0], "device_lengths", lambda op: _lengths(op, input_ids, mask)
    )
    for node in nodes:
        node.replace_input_with(_SEQLENS_K, seqlens)
        node.replace_input_with(_TOTAL, total)
    rows = _rows_of_the_head(graph)
    hidden = rows.inputs[0]
    assert hidden is not None
    (guarded,) = insert_before(rows, "guard", lambda op: _poison(op, hidden, broken))
    rows.replace_input_with(0, guarded)
    return len(nodes)


def _lengths(
    op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """seqlens_k int32 [B], total_sequence_length int32 [], and rows with a bad mask, bool [B]."""
    assert input_ids.shape is not None
    new, width = op.Shape(input_ids, start=1, end=2), op.Shape(attention_mask, start=1, end=2)
    ones = op.Cast(op.Cast(attention_mask, to=ir.DataType.BOOL), to=ir.DataType.INT64)
    lengths = op.ReduceSum(ones, [1], keepdims=0)
    # Finds a one after a zero: compares each slot with the one before it (the first with itself).
    before = op.Concat(op.Slice(ones, [0], [1], [1]), op.Slice(ones, [0], [-1], [1]), axis=1)
    rising = op.ReduceSum(op.Cast(op.Greater(ones, before), to=ir.DataType.INT64), [1], keepdims=0)
    broken = op.Or(op.Greater(rising, [0]), op.Less(lengths, [1]))
    if input_ids.shape[1] == 1:
        safe = op.Where(broken, [1], lengths)
    else:
        # Several new tokens after a past are never padded: see `fuse_attention`.
        whole = op.Max(width, new)
        broken = op.Or(broken, op.Less(lengths, op.Where(op.Equal(width, new), [1], whole)))
        safe = op.Where(broken, whole, lengths)
    seqlens = op.Cast(op.Sub(safe, [1]), to=ir.DataType.INT32)
    seqlens.name = "seqlens_k"
    table = op.initializer(ir.tensor(np.array([1], dtype=np.int64), name="mask_covers_new_tokens"))
    covered = op.Gather(table, op.Cast(op.Less(width, new), to=ir.DataType.INT64), axis=0)
    guard = covered.producer()
    assert guard is not None
    guard.name = GUARD_NODE
    total = op.Cast(op.Squeeze(op.Mul(width, covered)), to=ir.DataType.INT32)
    total.name = "total_sequence_length"
    return seqlens, total, broken


def _poison(op: OpBuilder, hidden: ir.Value, broken: ir.Value) -> tuple[ir.Value]:
    """Hidden states [B, M, H], with NaN in the broken rows."""
    nan = op.initializer(ir.tensor(np.array([np.nan], dtype=np.float32), name="nan"))
    zero = op.initializer(ir.tensor(np.array([0], dtype=np.float32), name="zero"))
    return (op.Add(hidden, op.Where(op.Unsqueeze(broken, [1, 2]), nan, zero)),)


def _rows_of_the_head(graph: ir.Graph) -> ir.Node:
    """The Reshape of the hidden states to rows, before the head's product."""
    node = logits_of(graph)[0].producer()
    for op_type, place in (("Cast", 0), ("Reshape", 0), ("Gemm", 0)):
        assert node is not None
        assert node.op_type == op_type, f"the head ends with {node.op_type}, expected {op_type}"
        value = node.inputs[place]
        assert value is not None
        node = value.producer()
    assert node is not None
    assert node.op_type == "Reshape"
    return node


def _rename_away(graph: ir.Graph, name: str) -> None:
    """Rename what `fuse_attention` gave this name; its unused nodes are removed later."""
    for node in graph:
        if node.name == name:
            node.name = f"replaced.{name}"
        for value in node.outputs:
            if value.name == name:
                value.name = f"replaced.{name}"
