"""Shifts and divides activation channels before a product, where no norm can do it.

    before                            after
    MatMul(x, Transpose(w))           MatMul((x − z) · (1/s), Transpose(w))
    Gemm(x, table, transB=1)          Gemm(x · (1/s), table, transB=1)
    Gather(table, ids)                Gather(table, ids) · (1/s)

The weight is multiplied by s when it is read, and W z is added to the bias
(`neo_export.quantize.migration`), so the result is the same. Without a shift there is no
subtraction. Must not fire for a place that is not rescaled, or that a norm rescales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from neo_export.gpt_neo.parameters import input_place
from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import add_lazy_initializer, is_parameter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass
    from neo_export.quantize.migration import Migration

__all__ = ["migrate_activations"]


class _Migrate(Rule):
    inverse = "inverse_scale"
    """Suffix of the name of the vector 1/s; its presence shows that the rule has fired."""

    def __init__(self, migration: Migration) -> None:
        super().__init__()
        self.migration = migration

    def check(self, context: Any, weight: ir.Value, **_: Any) -> Any:
        result = MatchResult()
        name = weight.name or ""
        if not is_parameter(weight) or weight.graph is None:
            return result.fail("the weight is computed", weight)
        if f"{name}.{self.inverse}" in weight.graph.initializers:
            return result.fail("its input is rescaled already", weight)
        if _place(name) not in self.migration.in_graph:
            return result.fail("its input is not rescaled here", weight)
        return result

    def _inverse(self, weight: ir.Value) -> ir.Value:
        scale = self.migration.scales[_place(str(weight.name))]
        return _stored(weight, self.inverse, np.float32(1) / scale)


class _Product(_Migrate):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        assert weight.graph is not None
        assert weight.name is not None
        place = _place(weight.name)
        shift = self.migration.shifts.get(place)
        if shift is not None:
            x = op.Sub(x, _stored(weight, "shift", shift))
        return op.MatMul(op.Mul(x, self._inverse(weight)), op.Transpose(weight, perm=[1, 0]))


class _Head(_Migrate):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.Gemm(x, weight, transB=1)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return op.Gemm(op.Mul(x, self._inverse(weight)), weight, transB=1)


class _Embedding(_Migrate):
    inverse = "rows.inverse_scale"

    def pattern(self, op: Any, weight: Any, ids: Any) -> Any:
        return op.Gather(weight, ids, axis=0)

    def rewrite(self, op: Any, weight: ir.Value, ids: ir.Value, **_: Any) -> Any:
        return op.Mul(op.Gather(weight, ids, axis=0), self._inverse(weight))


def _stored(weight: ir.Value, kind: str, values: NDArray[np.float32]) -> ir.Value:
    """An initializer for a vector, named after the matrix that it belongs to."""
    assert weight.graph is not None
    return add_lazy_initializer(
        weight.graph,
        f"{weight.name}.{kind}",
        lambda: values,
        dtype=ir.DataType.FLOAT,
        shape=values.shape,
    )


def _place(name: str) -> str:
    try:
        return input_place(name)
    except ValueError:
        return ""


def migrate_activations(migration: Migration) -> Pass:
    """The pass for the places that `migration` rescales in the graph."""

    def migrate(model: ir.Model) -> int:
        return sum(apply(rule, model, migration) for rule in (_Product, _Head, _Embedding))

    migrate.__name__ = "migrate_activations"
    return migrate
