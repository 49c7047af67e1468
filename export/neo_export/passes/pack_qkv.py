"""Packs the products for queries, keys and values into one.

    before                                       after
    GroupQueryAttention(MatMul(x, Wqᵀ),          GroupQueryAttention(MatMul(x, packedᵀ), …)
                        MatMul(x, Wkᵀ),
                        MatMul(x, Wvᵀ), …)

`packed` is [3·hidden, hidden]: Wq, Wk and Wv stacked by rows. New keys and values are then
channels of the packed product (`Probe.channels`). Must not fire when the three read different
inputs, when the plan stores them differently, or in a layer whose queries are selected
(`select_query`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.gpt_neo.parameters import place_in_packed
from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import add_lazy_initializer, is_parameter, read, static_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from neo_export.passes import Pass
    from neo_export.quantize.plan import WeightPlan

__all__ = ["PACKED_PLACE", "pack_qkv"]

PACKED_PLACE = "qkv"
"""Place name of the packed product; it replaces "key" and "value"."""


class _PackQKV(Rule):
    def __init__(self, alike: Callable[[list[str]], bool]) -> None:
        super().__init__()
        self.alike = alike

    def pattern(
        self,
        op: Any,
        x: Any,
        wq: Any,
        wk: Any,
        wv: Any,
        past_key: Any,
        past_value: Any,
        seqlens: Any,
        total: Any,
    ) -> Any:
        return op.GroupQueryAttention(
            op.MatMul(x, op.Transpose(wq, perm=[1, 0])),
            op.MatMul(x, op.Transpose(wk, perm=[1, 0])),
            op.MatMul(x, op.Transpose(wv, perm=[1, 0])),
            past_key,
            past_value,
            seqlens,
            total,
            _domain="com.microsoft",
            _allow_other_attributes=True,
            _outputs=["attended", "present_key", "present_value"],
        )

    def check(
        self, context: Any, wq: ir.Value, wk: ir.Value, wv: ir.Value, **_: Any
    ) -> MatchResult:
        result = MatchResult()
        for weight in (wq, wk, wv):
            if not is_parameter(weight):
                return result.fail("a projection is computed, not stored", weight)
            if weight.shape != wq.shape or weight.dtype != wq.dtype:
                return result.fail("the projections differ in shape or type", weight)
        if not self.alike([str(weight.name) for weight in (wq, wk, wv)]):
            return result.fail("the projections are stored in different ways", wq)
        return result

    def rewrite(
        self,
        op: Any,
        x: ir.Value,
        wq: ir.Value,
        wk: ir.Value,
        wv: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        seqlens: ir.Value,
        total: ir.Value,
        attended: ir.Value,
        **_: Any,
    ) -> Any:
        node, graph = attended.producer(), wq.graph
        assert node is not None
        assert graph is not None
        assert wq.dtype is not None
        assert wq.name is not None
        place = place_in_packed(wq.name)
        assert place is not None
        rows, columns = static_shape(wq)
        packed = add_lazy_initializer(
            graph,
            place[0],
            lambda: np.concatenate([read(wq), read(wk), read(wv)]),
            dtype=wq.dtype,
            shape=(3 * rows, columns),
        )
        product = op.MatMul(x, op.Transpose(packed, perm=[1, 0]))
        product.name = wq.name.split(".attn.")[0] + f".{PACKED_PLACE}"
        return op.GroupQueryAttention(
            product,
            None,
            None,
            past_key,
            past_value,
            seqlens,
            total,
            _domain="com.microsoft",
            _outputs=3,
            **dict(node.attributes),
        )


def pack_qkv(plan: WeightPlan, apart: int | None = None) -> Pass:
    """The pass for layers whose three projections the plan stores alike; not for layer `apart`."""

    def alike(names: list[str]) -> bool:
        return plan.packs(names) and not names[0].startswith(f"transformer.h.{apart}.")

    def pack_qkv(model: ir.Model) -> int:
        """Apply to the whole model; returns how many layers were packed."""
        return apply(_PackQKV, model, alike)

    return pack_qkv
