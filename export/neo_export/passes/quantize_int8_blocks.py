"""Stores weights in int8 for a kernel that dequantizes them: MatMulNBits, as for int4.

    before                            after
    MatMul(x, Transpose(w))           MatMulNBits(x, w.int8, scales, bits=8)
    Gemm(x, table, transB=1)          the same
    Gather(table, ids)                GatherBlockQuantized over the same bytes and scales

The operator needs one scale per block: all blocks of a row get the row's scale. Integers are stored
with the operator's zero point, 128, added. The tied table is stored once, under two shapes.
Must not fire for a weight that is kept wider, or that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from neo_export.passes._block_operators import block_product, block_rows
from neo_export.passes._stored_weight import store_weights
from neo_export.passes._tensors import add_lazy_parts, alias_of, read, static_shape
from neo_export.quantize.int4 import largest_block_size
from neo_export.quantize.quantizer import EightBits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["quantize_int8_blocks"]

_BITS, _ZERO = 8, 128


@dataclass(frozen=True)
class _Int8Blocks:
    """See the module."""

    quantizer: WeightQuantizer

    def product(self, op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
        stored, scales, size = self._stored(weight)
        return block_product(op, x, stored, scales, bits=_BITS, block_size=size)

    def rows(self, op: Any, weight: ir.Value, ids: ir.Value) -> ir.Value:
        shape = static_shape(weight)
        table, scales, size = self._stored(weight, shape)
        if static_shape(table) != shape:  # the head reads it, too
            table = alias_of(table, f"{weight.name}.int8.rows", shape)
        return block_rows(op, table, ids, scales, bits=_BITS, block_size=size)

    def _stored(
        self, weight: ir.Value, shape: tuple[int, ...] | None = None
    ) -> tuple[ir.Value, ir.Value, int]:
        """Integers, scales and block size; made once for all readers of the weight.

        The first reader's `shape` becomes the shape of the integers; None is a product's shape.
        """
        graph, name = weight.graph, str(weight.name)
        assert graph is not None
        rows, columns = static_shape(weight)
        size = largest_block_size((columns,), "--fp16")
        blocks = columns // size
        stored_shape = shape or (rows, blocks, size)

        def make() -> tuple[NDArray[Any], ...]:
            made = self.quantizer.int8(name, read(weight))
            integers = (made.integers.astype(np.int16) + _ZERO).astype(np.uint8)
            scales = np.repeat(made.scales[:, None], blocks, axis=1)
            return integers.reshape(stored_shape), scales

        stored, scales = add_lazy_parts(
            graph,
            {
                f"{name}.int8": (ir.DataType.UINT8, stored_shape),
                f"{name}.int8.scales": (ir.DataType.FLOAT, (rows, blocks)),
            },
            make,
        )
        return stored, scales, size


def quantize_int8_blocks(plan: WeightPlan, quantizer: WeightQuantizer | None = None) -> Pass:
    """The pass for the matrices that the plan stores in int8."""

    def quantize_int8(model: ir.Model) -> int:
        weights = _Int8Blocks(quantizer or EightBits())
        return store_weights(model, weights, lambda name: plan.of(name).kind == "int8")

    return quantize_int8
