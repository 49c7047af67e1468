"""Rewrites attention for a cache of static length, in the standard operators of opset 24.

    before                                         after
    key   = Concat(past_key, heads(k))             key   = TensorScatter(past_key, heads(k), first)
    value = Concat(past_value, heads(v))           value = TensorScatter(past_value, …, first)
    s = MatMul(heads(q), keyᵀ)                     out = merge(CastLike(Attention(f32(heads(q)),
    out = merge(MatMul(Softmax(Where(mask, s,              f32(key), f32(value), mask, scale=1), v))
                       min)), value))

`first` is `position_ids[:, 0]`: the position of a row's first new token is both the number of
tokens that the row has cached and the slot that the new token is written to. So `attention_mask`
is no longer an input, and a row's new tokens may be padded on the right: padding is written after
every valid position, where no valid query attends, and later tokens overwrite it. A slot that was
never written is masked, but its value is still multiplied by 0: buffers must be finite from the
start (zeros).

This is the form that TensorRT imports: `TensorScatter` becomes its KVCacheUpdate layer, whose past
and present share one address; its parser refuses `Attention` with past outputs or
`softmax_precision`. Attention scales by 1/√d by default, hence `scale=1`. Its scores have the type
of its inputs, and unscaled scores exceed 65504: in half precision all three inputs are cast to
float32 (TensorRT takes no mixed types). After that cast, keys and values are reshaped to three
axes and back. This changes nothing, but without it the builder of TensorRT for RTX crashes on an
attention that reads a half-precision cache through a cast.

Must not fire on a mask that is not the model's own; fires for all layers or for none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from neo_export.gpt_neo.model import WINDOW_KEY
from neo_export.passes._attention import AttentionRule
from neo_export.passes._insert import insert_before
from neo_export.passes._rule import MatchResult, apply
from neo_export.passes._tensors import add_initializer

if TYPE_CHECKING:
    from onnxscript import OpBuilder

    from neo_export.passes import Pass

__all__ = ["IR_VERSION", "OPSET", "static_cache"]

OPSET = 24
"""The first opset with TensorScatter and with an Attention that this form can use."""
IR_VERSION = 12
_SEQUENCE_AXIS = -2
_FULL = -1  # `WINDOW_KEY` of a layer without a window


class _ScatterAndAttend(AttentionRule):
    def __init__(
        self, first: ir.Value, masks: dict[int, ir.Value], folded: ir.Value, whole: ir.Value
    ) -> None:
        super().__init__()
        self.first, self.masks, self.folded, self.whole = first, masks, folded, whole

    def check(self, context: Any, mask: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if int(mask.metadata_props.get(WINDOW_KEY, 0)) not in self.masks:
            return result.fail("the mask is not one of the model's own", mask)
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
        split: ir.Value,
        merge: ir.Value,
        **_: Any,
    ) -> Any:
        def heads(x: ir.Value) -> ir.Value:
            split_heads: ir.Value = op.Transpose(op.Reshape(x, split), perm=[0, 2, 1, 3])
            return split_heads

        def scatter(past: ir.Value, new: ir.Value) -> ir.Value:
            updated: ir.Value = op.TensorScatter(past, heads(new), self.first, axis=_SEQUENCE_AXIS)
            return updated

        def widened(cache: ir.Value) -> ir.Value:
            """The whole cache in float32, [B, N, max_length, D]."""
            folded = op.Reshape(op.Cast(cache, to=ir.DataType.FLOAT), self.folded)
            whole: ir.Value = op.Reshape(folded, self.whole)
            return whole

        present_key, present_value = scatter(past_key, key), scatter(past_value, value)
        attended = op.Attention(
            op.Cast(heads(query), to=ir.DataType.FLOAT),
            widened(present_key),
            widened(present_value),
            self.masks[int(mask.metadata_props[WINDOW_KEY])],
            scale=1.0,
        )
        narrowed = op.CastLike(attended, present_value)
        merged = op.Reshape(op.Transpose(narrowed, perm=[0, 2, 1, 3]), merge)
        return merged, present_key, present_value


def static_cache(max_length: int) -> Pass:
    """The pass for caches of `max_length` positions."""

    def static_cache(model: ir.Model) -> int:
        """Apply to the whole model; returns how many layers were rewritten."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        pasts = [v for v in graph.inputs if (v.name or "").startswith("past_key_values.")]
        windows = sorted({int(past.metadata_props[WINDOW_KEY]) for past in pasts})
        graph.opset_imports[""] = OPSET
        model.ir_version = IR_VERSION
        heads, size = (pasts[0].shape or ())[1::2]
        folded = _constant(graph, "cache_folded_shape", [-1, max_length, size])
        whole = _constant(graph, "cache_shape", [-1, heads, max_length, size])
        first, *masks = insert_before(
            graph[0],
            "slots",
            lambda op: _slots_and_masks(op, inputs["position_ids"], windows, max_length),
        )
        by_window = dict(zip(windows, masks, strict=True))
        fired = apply(_ScatterAndAttend, model, first, by_window, folded, whole)
        if fired != len(pasts) // 2:
            raise AssertionError(f"{fired} of {len(pasts) // 2} layers have the expected attention")
        RemoveUnusedNodesPass()(model)
        if inputs["attention_mask"].uses():
            raise AssertionError("something beside attention reads attention_mask")
        graph.inputs.remove(inputs["attention_mask"])
        for value in (*pasts, *graph.outputs):
            if value in pasts or (value.name or "").startswith("present."):
                assert value.shape is not None
                value.shape = ir.Shape([*value.shape[:2], max_length, value.shape[3]])
        return fired

    return static_cache


def _constant(graph: ir.Graph, name: str, values: list[Any]) -> ir.Value:
    return add_initializer(graph, name, ir.tensor(np.array(values, dtype=np.int64), name=name))


def _slots_and_masks(
    op: OpBuilder, position_ids: ir.Value, windows: list[int], max_length: int
) -> tuple[ir.Value, ...]:
    """The slot of each row's first new token, and the slots that its queries may attend to.

    Returns:
        The first slots, int64 [B], then for each of `windows` a mask, bool [B, 1, S, max_length].
    """
    first = op.Gather(position_ids, 0, axis=1)
    first.name = "write_indices"
    new = op.Squeeze(op.Shape(position_ids, start=1, end=2))
    queries = op.Add(op.Unsqueeze(first, [1]), op.Range(0, new, 1))
    queries = op.Unsqueeze(queries, [1, 3])
    slots = np.arange(max_length, dtype=np.int64).reshape(1, 1, 1, max_length)
    keys = op.initializer(ir.tensor(slots, name="cache_slots"))
    causal = op.LessOrEqual(keys, queries)
    masks = []
    for window in windows:
        full = window == _FULL
        mask = causal if full else op.And(causal, op.Greater(keys, op.Sub(queries, window)))
        mask.name = "causal_mask" if full else "windowed_mask"
        masks.append(mask)
    return (first, *masks)
