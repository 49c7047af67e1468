"""Attention and its cache in one operator, with the cache updated in place.

    before                                          after
    key   = Concat(past_key, heads(k))              out, key, value = GroupQueryAttention(
    value = Concat(past_value, heads(v))                q, k, v, past_key, past_value,
    s = MatMul(heads(q), keyᵀ)                          lengths − 1, total, scale=1,
    out = merge(MatMul(Softmax(Where(mask, s, min)),    local_window_size=window)
                       value))

com.microsoft.GroupQueryAttention writes the new keys and values into the past's own buffer when
past and present are bound to one address. `local_window_size` counts the current position, as
GPT-Neo's window does. The operator supports only right padding, so the pass also inserts a guard
at the start of the graph (`_lengths` below): a mask that the operator does not support fails there,
by an index out of bounds in the node `attention_mask_must_be_right_padded`, instead of giving a
wrong answer.

Must not fire when the head size is not a multiple of 8 (the kernels require that), or on a mask
that is not the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from neo_export.gpt_neo.model import WINDOW_KEY
from neo_export.passes._attention import AttentionRule
from neo_export.passes._insert import insert_before
from neo_export.passes._rule import MatchResult, apply

if TYPE_CHECKING:
    from onnxscript import OpBuilder

__all__ = ["GUARD_NODE", "HEAD_SIZE_MULTIPLE", "fuse_attention"]

HEAD_SIZE_MULTIPLE = 8
GUARD_NODE = "attention_mask_must_be_right_padded"


class _GroupQueryAttention(AttentionRule):
    def __init__(self, seqlens: ir.Value, total: ir.Value) -> None:
        super().__init__()
        self.seqlens, self.total = seqlens, total

    def check(self, context: Any, mask: ir.Value, past_key: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if WINDOW_KEY not in mask.metadata_props:
            return result.fail("the mask is not one of the model's own", mask)
        size = past_key.shape[3] if past_key.shape is not None else None
        if not isinstance(size, int) or size % HEAD_SIZE_MULTIPLE:
            return result.fail(
                f"head size {size} is not a multiple of {HEAD_SIZE_MULTIPLE}", past_key
            )
        return result

    def rewrite(
        self,
        op: Any,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        mask: ir.Value,
        **_: Any,
    ) -> Any:
        assert past_key.shape is not None
        heads = past_key.shape[1]
        return op.GroupQueryAttention(
            query,
            key,
            value,
            past_key,
            past_value,
            self.seqlens,
            self.total,
            num_heads=heads,
            kv_num_heads=heads,
            scale=1.0,
            local_window_size=int(mask.metadata_props[WINDOW_KEY]),
            do_rotary=0,
            _domain="com.microsoft",
            _outputs=3,
        )


def fuse_attention(model: ir.Model) -> int:
    """Apply to the whole model; returns how many layers were fused."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    past_key = _longest_past(graph)
    size = past_key.shape[3] if past_key.shape is not None else None
    if not isinstance(size, int) or size % HEAD_SIZE_MULTIPLE:
        return 0
    seqlens, total = insert_before(
        graph[0],
        "lengths",
        lambda op: _lengths(op, inputs["input_ids"], inputs["attention_mask"], past_key),
    )
    return apply(_GroupQueryAttention, model, seqlens, total)


def _longest_past(graph: ir.Graph) -> ir.Value:
    """Past keys of the first global layer; a later pass may cut local layers to their window."""
    pasts = [value for value in graph.inputs if (value.name or "").endswith(".key")]
    return next((past for past in pasts if past.metadata_props[WINDOW_KEY] == "-1"), pasts[0])


def _lengths(
    op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, past_key: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The operator's `seqlens_k` (valid positions of each row − 1) and the mask's width.

    Computed once per graph: int32 [B] and int32 [].

    The operator compares the mask's width W with the number of new tokens S. W = S is a first
    prompt: the cache's content is overwritten. Otherwise row b's new tokens are the last S of its
    n_b valid positions, and its past is the n_b − S positions before them. With P the length of
    the cache, the guard requires:

    - every row of the mask is ones, then zeros, and 1 ≤ n_b;
    - with a past, S ≤ n_b ≤ P + S;
    - with a past, n_b = W if the cache is exactly the past (W = P + S: a shorter row would mean
      padded new tokens), or if there are several new tokens (the model looks for the last valid
      one at the end of the mask).
    """
    new, width = op.Shape(input_ids, start=1, end=2), op.Shape(attention_mask, start=1, end=2)
    past = op.Shape(past_key, start=2, end=3)
    valid = op.Cast(attention_mask, to=ir.DataType.BOOL)
    lengths = op.ReduceSum(op.Cast(valid, to=ir.DataType.INT64), [1], keepdims=0)
    expected = op.Less(op.Range(0, op.Squeeze(width), 1), op.Unsqueeze(lengths, [1]))
    misplaced = op.Cast(op.Xor(valid, expected), to=ir.DataType.INT64)
    shortest = op.ReduceMin(lengths, keepdims=1)
    longest = op.ReduceMax(lengths, keepdims=1)
    first_prompt = op.Equal(width, new)
    exact = op.Or(op.Greater(new, [1]), op.Equal(width, op.Add(past, new)))
    least = op.Where(first_prompt, [1], op.Where(exact, op.Max(width, new), new))
    most = op.Where(first_prompt, width, op.Add(past, new))
    broken = op.Or(op.Less(shortest, least), op.Greater(longest, most))
    broken = op.Or(broken, op.Greater(op.ReduceMax(misplaced, keepdims=0), 0))
    # The table has one entry: index 0 reads the 1 to subtract, index 1 raises the error.
    one = ir.tensor(np.array([1], dtype=np.int64), name="one_to_subtract")
    table = op.initializer(one)
    subtract = op.Gather(table, op.Cast(broken, to=ir.DataType.INT64), axis=0)
    guard = subtract.producer()
    assert guard is not None
    guard.name = GUARD_NODE
    seqlens = op.Sub(lengths, subtract)
    seqlens = op.Cast(seqlens, to=ir.DataType.INT32)
    seqlens.name = "seqlens_k"
    total = op.Cast(op.Squeeze(width), to=ir.DataType.INT32)
    total.name = "total_sequence_length"
    return seqlens, total
