"""Limits the cache of local layers to their window.

    before                                    after
    GroupQueryAttention(local_window_size=W)  the same with sliding_window_cache=1, and with
                                              query_seqlens: how many new tokens are not padding

The operator then evicts old positions itself: for these layers it takes buffers of any capacity
C ≥ W, and keeps the most recent positions contiguous at their front. If C is at least the number
of positions in use, nothing is evicted, so an engine that gives every layer full-length buffers
runs the same graph. An empty past (C = 0) is no longer allowed for a local layer.

Must not fire when no layer is global: the guard of `fuse_attention` takes the sequence's length
from a full-length buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from neo_export.passes._insert import insert_before

if TYPE_CHECKING:
    from onnxscript import OpBuilder

__all__ = ["WINDOW_DIMENSION", "window_caches"]

WINDOW_DIMENSION = "window_sequence"
"""Symbolic dimension of a local layer's cache length, in the graphs' inputs and outputs."""

_ATTRIBUTE = "sliding_window_cache"
_SEQLENS_K, _QUERY_SEQLENS = 5, 16  # places among the operator's inputs


def window_caches(model: ir.Model) -> int:
    """Apply to the whole model; returns how many layers keep only their window."""
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    local = [node for node in nodes if node.attributes.get_int("local_window_size", -1) > 0]
    if len(local) == len(nodes):
        return 0
    if not local:
        return 0
    inputs = {value.name: value for value in model.graph.inputs}
    seqlens = local[0].inputs[_SEQLENS_K]
    assert seqlens is not None
    (query_seqlens,) = insert_before(
        nodes[0],
        "query_lengths",
        lambda op: _query_seqlens(op, inputs["input_ids"], inputs["attention_mask"], seqlens),
    )
    for node in local:
        node.resize_inputs(_QUERY_SEQLENS + 1)
        node.replace_input_with(_QUERY_SEQLENS, query_seqlens)
        node.attributes[_ATTRIBUTE] = ir.AttrInt64(_ATTRIBUTE, 1)
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            if value is not None and value.shape is not None:
                value.shape[2] = WINDOW_DIMENSION
    return len(local)


def _query_seqlens(
    op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, seqlens_k: ir.Value
) -> tuple[ir.Value]:
    """Number of new tokens of each row that are not padding, int32 [B].

    A first prompt (mask as wide as the new tokens) may be padded: a row has seqlens_k + 1 tokens.
    Later tokens are never padded: the guard of `fuse_attention` ensures that.
    """
    new, width = op.Shape(input_ids, start=1, end=2), op.Shape(attention_mask, start=1, end=2)
    valid = op.Add(op.Cast(seqlens_k, to=ir.DataType.INT64), 1)
    lengths = op.Where(op.Equal(width, new), valid, new)
    lengths = op.Cast(lengths, to=ir.DataType.INT32)
    lengths.name = "query_seqlens"
    return (lengths,)
