"""Stores weights in the layout that the product reads.

    before                              after
    MatMul(x, Transpose(weight))        MatMul(x, weight.transposed)

`weight` is [out, in], as in the checkpoint. This is done at export because a runtime would
constant-fold the Transpose into a private copy at every load. Must not fire for a computed operand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import add_lazy_initializer, is_parameter, read, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["store_transposed"]


class _StoreTransposed(Rule):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def check(self, context: Any, weight: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if not is_parameter(weight):
            return result.fail("the transposed operand is computed, not stored", weight)
        return result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value) -> Any:
        graph, dtype = weight.graph, weight.dtype
        assert graph is not None
        assert dtype is not None
        rows, columns = static_shape(weight)
        stored = add_lazy_initializer(
            graph,
            f"{weight.name}.transposed",
            lambda: np.ascontiguousarray(read(weight).T),
            dtype=dtype,
            shape=(columns, rows),
        )
        return op.MatMul(x, stored)


def store_transposed(model: ir.Model) -> int:
    """Apply to the whole model; returns how many weights were transposed."""
    return apply(_StoreTransposed, model)
