"""int8 weights, activations quantized a row at a time.

    before                            after
    MatMul(x, Transpose(w))           row = max(max|x| along the row, tiny)
                                      q   = QuantizeLinear(x / row, 1/127, 128)          u8
                                      y   = MatMulIntegerToFloat(q, w.int8, 1/127, s) · row
    Gemm(x, table, transB=1)          the same, with the table stored [hidden, vocabulary]
    Gather(table, ids)                columns of that same table · their scales

One scale a row (token), so that no row depends on its neighbours or on padding. The tied table is
stored once: the head reads it as a product wants it, the embedding gathers columns of it.
Must not fire for a weight that is kept wider, or that is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import (
    add_initializer,
    add_lazy_parts,
    is_parameter,
    read,
    static_shape,
)
from neo_export.quantize.int8 import quantize_int8
from neo_export.quantize.stored import is_kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass

__all__ = ["quantize_int8_weights"]

_LEVELS = 127
_ZERO = 128
_TINY = 1e-30  # a row of zeros must not divide by zero


class _Int8(Rule):
    """What the three rules share; `keep` are shell patterns of names."""

    def __init__(self, keep: tuple[str, ...]) -> None:
        super().__init__()
        self.keep = keep

    def check(self, context: Any, weight: ir.Value, **_: Any) -> Any:
        result = MatchResult()
        if not is_parameter(weight) or weight.dtype != ir.DataType.FLOAT:
            return result.fail("the weight is computed, or not float32", weight)
        if weight.shape is None or len(weight.shape) != 2 or is_kept(weight.name, self.keep):
            return result.fail("the weight is kept as it is", weight)
        return result


class _Product(_Int8):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return _integer_product(op, x, weight)


class _Head(_Int8):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.Gemm(x, weight, transB=1)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return _integer_product(op, x, weight)


class _Table(_Int8):
    def pattern(self, op: Any, weight: Any, ids: Any) -> Any:
        return op.Gather(weight, ids, axis=0)

    def check(self, context: Any, weight: ir.Value, **_: Any) -> Any:
        if weight.name is not None and weight.name.endswith("wpe.weight"):
            return MatchResult().fail("positions are stored by their own pass", weight)
        return super().check(context, weight)

    def rewrite(self, op: Any, weight: ir.Value, ids: ir.Value, **_: Any) -> Any:
        integers, scales = _stored(weight)
        columns = op.Transpose(op.Gather(integers, ids, axis=1), perm=[1, 2, 0])
        scale = op.Unsqueeze(op.Gather(scales, ids, axis=0), _last_axis(weight))
        return op.Mul(op.Cast(columns, to=ir.DataType.FLOAT), scale)


def _integer_product(op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
    graph = weight.graph
    assert graph is not None
    integers, scales = _stored(weight)
    step = add_initializer(graph, "int8.step", _scalar(np.float32(1 / _LEVELS)))
    zero = add_initializer(graph, "int8.zero", _scalar(np.uint8(_ZERO)))
    tiny = add_initializer(graph, "int8.tiny", _scalar(np.float32(_TINY)))
    largest = op.ReduceMax(op.Abs(x), _last_axis(weight), keepdims=1)
    row = op.Max(largest, tiny)
    quantized = op.QuantizeLinear(op.Div(x, row), step, zero)
    product = op.MatMulIntegerToFloat(
        quantized, integers, step, scales, zero, _domain="com.microsoft"
    )
    scaled: ir.Value = op.Mul(product, row)
    return scaled


def _stored(weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The weight's integers [in, out] and scales [out]; made once, however often it is read."""
    graph = weight.graph
    assert graph is not None
    rows, columns = static_shape(weight)

    def make() -> tuple[NDArray[Any], ...]:
        stored = quantize_int8(read(weight))
        return np.ascontiguousarray(stored.integers.T), stored.scales

    integers, scales = add_lazy_parts(
        graph,
        {
            f"{weight.name}.int8": (ir.DataType.INT8, (columns, rows)),
            f"{weight.name}.int8.scales": (ir.DataType.FLOAT, (rows,)),
        },
        make,
    )
    return integers, scales


def _last_axis(weight: ir.Value) -> ir.Value:
    assert weight.graph is not None
    return add_initializer(weight.graph, "int8.last_axis", ir.tensor(np.array([-1], np.int64)))


def _scalar(value: np.generic) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(value))


def quantize_int8_weights(keep: tuple[str, ...] = ()) -> Pass:
    """The pass, for all matrices but those whose names match one of the shell patterns `keep`."""

    def quantize_int8(model: ir.Model) -> int:
        return sum(apply(rule, model, keep) for rule in (_Product, _Head, _Table))

    return quantize_int8
