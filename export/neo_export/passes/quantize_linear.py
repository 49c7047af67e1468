"""Quantizes the weights of projections, and optionally their inputs, in ONNX's Q/DQ form.

    before                            after
    MatMul(x, Transpose(w))           MatMul(x, DequantizeLinear(w.int8, scales))
    with the scale of x known         MatMul(DequantizeLinear(QuantizeLinear(x, s), s), the same)

TensorRT's networks are strongly typed, and this is how a graph tells it the precision: a weight
that reaches a product through DequantizeLinear stays compressed in the engine, and if the input is
quantized, too, the product itself is computed in that type. Weights are stored as [in, out]; int8
and fp8 have one scale per output, int4 one for every `block_size` inputs of an output. Scales are
float16, which makes the product float16: `neo_export.passes.float16` runs after this pass.

The embedding (and a head that is tied to it) stays float16, stored once: a table behind
DequantizeLinear would be expanded whole at every step, to gather a few of its rows.
Must not fire for a weight that is computed, or that the plan stores in another form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from neo_runtime.errors import RequestError

from neo_export.passes._rule import MatchResult, Rule, apply
from neo_export.passes._tensors import (
    add_initializer,
    add_lazy_parts,
    is_parameter,
    read,
    static_shape,
)
from neo_export.quantize.int4 import check_block_size
from neo_export.quantize.levels import FARTHEST
from neo_export.quantize.linear import LEVELS, quantize_linear

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass
    from neo_export.quantize.plan import Storage, WeightPlan

__all__ = ["ActivationRange", "quantize_linear_weights"]

ActivationRange = Callable[[str], float | None]
"""Name of a matrix → the largest |x| of its input; None where it is not known."""

_TYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}
_NUMPY = {"int8": np.int8, "int4": ml_dtypes.int4, "fp8": ml_dtypes.float8_e4m3fn}
_HALF = ir.DataType.FLOAT16


class _QuantizeLinear(Rule):
    def __init__(self, plan: WeightPlan, largest_input: ActivationRange | None) -> None:
        super().__init__()
        self.plan, self.largest_input = plan, largest_input

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def check(self, context: Any, weight: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if not is_parameter(weight) or weight.dtype != ir.DataType.FLOAT:
            return result.fail("the weight is computed, or not float32", weight)
        if self.plan.of(str(weight.name)).kind not in _TYPES:
            return result.fail("the weight is kept as it is", weight)
        return result

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value) -> Any:
        storage = self.plan.of(str(weight.name))
        largest = self.largest_input(str(weight.name)) if self.largest_input else None
        if largest is not None and storage.kind != "int4":
            x = _quantized_input(op, x, weight, storage.kind, largest)
        values, scales = _stored(weight, storage)
        if storage.kind == "int4":
            wide = op.DequantizeLinear(values, scales, axis=0, block_size=storage.block_size)
        else:
            wide = op.DequantizeLinear(values, scales, axis=1)
        wide.type = ir.TensorType(_HALF)
        return op.MatMul(x, wide)


def _quantized_input(op: Any, x: ir.Value, weight: ir.Value, kind: str, largest: float) -> ir.Value:
    graph = weight.graph
    assert graph is not None
    step = np.float16(max(largest / LEVELS[kind], 2.0**-14))
    scale = _scalar(graph, f"{weight.name}.input_scale", step)
    zero = _scalar(graph, f"zero.{kind}", np.zeros((), dtype=_NUMPY[kind]))
    narrow = op.QuantizeLinear(x, scale, zero)
    narrow.type = ir.TensorType(_TYPES[kind])
    wide: ir.Value = op.DequantizeLinear(narrow, scale, zero)
    wide.type = ir.TensorType(_HALF)
    return wide


def _scalar(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    return add_initializer(graph, name, ir.tensor(np.asarray(value), name=name))


def _stored(weight: ir.Value, storage: Storage) -> tuple[ir.Value, ...]:
    assert weight.graph is not None
    kind, block = storage.kind, storage.block_size
    rows, columns = static_shape(weight)
    scale_shape: tuple[int, ...] = (rows,)
    if kind == "int4":
        assert block is not None
        check_block_size(block, columns, str(weight.name))
        scale_shape = (columns // block, rows)

    def make() -> tuple[NDArray[Any], NDArray[Any]]:
        stored = quantize_linear(read(weight), kind, block if kind == "int4" else None)
        if not stored.distance <= FARTHEST[kind]:
            raise RequestError(
                f"{weight.name} cannot be stored in {kind}: that would be {stored.distance:.2g} "
                "from it (relative L2), as float16 has no scales that small; export with "
                "--fp16 or --fp32, or for target cpu"
            )
        values = np.ascontiguousarray(stored.values.T).astype(_NUMPY[kind], copy=False)
        return values, np.ascontiguousarray(stored.scales.T).reshape(scale_shape)

    label = f"{kind}.{block}" if kind == "int4" else kind
    parts = {
        f"{weight.name}.{label}": (_TYPES[kind], (columns, rows)),
        f"{weight.name}.{label}.scales": (_HALF, scale_shape),
    }
    return add_lazy_parts(weight.graph, parts, make)


def quantize_linear_weights(plan: WeightPlan, largest_input: ActivationRange | None = None) -> Pass:
    """The pass for this plan.

    Args:
        plan: the storage of every matrix.
        largest_input: ranges of inputs; the inputs of int8 and fp8 products are quantized, too,
            where their range is known. None to quantize weights only.
    """

    def quantize_linear_weights(model: ir.Model) -> int:
        """Apply to the whole model; returns how many products have quantized weights."""
        return apply(_QuantizeLinear, model, plan, largest_input)

    return quantize_linear_weights
