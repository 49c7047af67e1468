"""Stores weights in int8 and quantizes activations dynamically, with one scale per row.

    before                            after
    MatMul(x, Transpose(w))           row = max(max|x| along the row, tiny)
                                      q   = QuantizeLinear(x / row, 1/127, 128)          u8
                                      y   = MatMulIntegerToFloat(q, w.int8, 1/127, s) · row
    MatMul(FastGelu(x), …)            the same, with row = max(max gelu along the row, 0.171)
    Gemm(x, table, transB=1)          the same, with the table stored [hidden, vocabulary]
    Gather(table, ids)                rows of Transpose(that same table) · their scales

Every row (token) has its own scale, so no row depends on its neighbours or on padding. GELU is
never below -0.171, so the maximum of 0.171 and the row's largest value bounds every magnitude in
the row; a row whose values are all smaller has steps of 0.0013.

The tied table is stored once, in the head's layout. For the embedding onnxruntime transposes it
when it loads the graph, and keeps the copy with its prepacked weights: reading a token's column
directly would touch one cache line per channel. (The embedding of an untied model is stored the
same way, though the head does not read it.)

`quantize_rows` then merges division and rounding where there are many rows. Must not fire for a
weight that is kept wider, or that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from neo_export.passes._stored_weight import store_weights
from neo_export.passes._tensors import (
    add_initializer,
    add_lazy_parts,
    read,
    static_shape,
)
from neo_export.quantize.quantizer import RoundToNearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["quantize_int8_weights"]

_LEVELS = 127
_ZERO = 128
_TINY = 1e-30  # a row of zeros must not divide by zero
_GELU_DEPTH = 0.171  # gelu_new has its minimum at -0.7525: -0.17004


@dataclass(frozen=True)
class _Int8:
    """See the module."""

    quantizer: WeightQuantizer

    def rows(self, op: Any, weight: ir.Value, ids: ir.Value) -> ir.Value:
        integers, scales = self._stored(weight)
        rows = op.Gather(op.Transpose(integers, perm=[1, 0]), ids, axis=0)
        scale = op.Unsqueeze(op.Gather(scales, ids, axis=0), _last_axis(weight))
        embedded: ir.Value = op.Mul(op.Cast(rows, to=ir.DataType.FLOAT), scale)
        return embedded

    def product(self, op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
        graph = weight.graph
        assert graph is not None
        integers, scales = self._stored(weight)
        step = add_initializer(graph, "int8.step", _scalar(np.float32(1 / _LEVELS)))
        zero = add_initializer(graph, "int8.zero", _scalar(np.uint8(_ZERO)))
        row = self._largest(op, x, weight)
        quantized = op.QuantizeLinear(op.Div(x, row), step, zero)
        product = op.MatMulIntegerToFloat(
            quantized, integers, step, scales, zero, _domain="com.microsoft"
        )
        scaled: ir.Value = op.Mul(product, row)
        return scaled

    def _largest(self, op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
        """The magnitude that 127 represents in each row, [..., 1]; never 0."""
        graph, axis = weight.graph, _last_axis(weight)
        assert graph is not None
        node = x.producer()
        gelu = node is not None and node.op_type == "FastGelu"
        name, least = ("int8.gelu_depth", _GELU_DEPTH) if gelu else ("int8.tiny", _TINY)
        floor = add_initializer(graph, name, _scalar(np.float32(least)))
        row: ir.Value = op.Max(op.ReduceMax(x if gelu else op.Abs(x), axis, keepdims=1), floor)
        return row

    def _stored(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The integers [in, out] and scales [out]; made once for all readers of the weight."""
        graph, name = weight.graph, str(weight.name)
        assert graph is not None
        rows, columns = static_shape(weight)

        def make() -> tuple[NDArray[Any], ...]:
            stored = self.quantizer.int8(name, read(weight))
            return np.ascontiguousarray(stored.integers.T), stored.scales

        integers, scales = add_lazy_parts(
            graph,
            {
                f"{name}.int8": (ir.DataType.INT8, (columns, rows)),
                f"{name}.int8.scales": (ir.DataType.FLOAT, (rows,)),
            },
            make,
        )
        return integers, scales


def _last_axis(weight: ir.Value) -> ir.Value:
    assert weight.graph is not None
    return add_initializer(weight.graph, "int8.last_axis", ir.tensor(np.array([-1], np.int64)))


def _scalar(value: np.generic) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(value))


def quantize_int8_weights(plan: WeightPlan, quantizer: WeightQuantizer | None = None) -> Pass:
    """The pass for the matrices that the plan stores in int8."""

    def quantize_int8(model: ir.Model) -> int:
        weights = _Int8(quantizer or RoundToNearest())
        return store_weights(model, weights, lambda name: plan.of(name).kind == "int8")

    return quantize_int8
