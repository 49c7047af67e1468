"""The three patterns that read a weight matrix, for passes that change how it is stored.

MatMul(x, Transpose(w))      a projection
Gemm(x, table, transB=1)     the head
Gather(table, ids)           the embedding
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

from neo_export.gpt_neo.parameters import POSITIONS
from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import is_parameter

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WeightFormat", "store_weights"]


class WeightFormat(Protocol):
    """How a pass rewrites the two operations on a weight [out, in]."""

    def product(self, op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
        """X · weightᵀ."""

    def rows(self, op: Any, weight: ir.Value, ids: ir.Value) -> ir.Value:
        """weight[ids]."""


class _StoreWeight(Rule):
    def __init__(self, weights: WeightFormat, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.weights, self.wanted = weights, wanted

    def check(self, context: Any, weight: ir.Value, **_: Any) -> Any:
        result = MatchResult()
        if not is_parameter(weight) or weight.dtype != ir.DataType.FLOAT:
            return result.fail("the weight is computed, or not float32", weight)
        if weight.shape is None or len(weight.shape) != 2 or not self.wanted(str(weight.name)):
            return result.fail("the weight is stored in another way", weight)
        return result


class _Projection(_StoreWeight):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return self.weights.product(op, x, weight)


class _Head(_StoreWeight):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.Gemm(x, weight, transB=1)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return self.weights.product(op, x, weight)


class _Embedding(_StoreWeight):
    def pattern(self, op: Any, weight: Any, ids: Any) -> Any:
        return op.Gather(weight, ids, axis=0)

    def check(self, context: Any, weight: ir.Value, **_: Any) -> Any:
        if weight.name == POSITIONS:
            return MatchResult().fail("positions are stored by a pass of their own", weight)
        return super().check(context, weight)

    def rewrite(self, op: Any, weight: ir.Value, ids: ir.Value, **_: Any) -> Any:
        return self.weights.rows(op, weight, ids)


def store_weights(model: ir.Model, weights: WeightFormat, wanted: Callable[[str], bool]) -> int:
    """Rewrite every reader of a matrix for whose name `wanted` is true.

    Returns:
        How many readers were rewritten.
    """
    rules = (_Projection, _Head, _Embedding)
    return sum(apply(rule, model, weights, wanted) for rule in rules)
