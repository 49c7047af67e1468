"""Stores weights in block-wise int4.

    before                            after
    MatMul(x, Transpose(w))           MatMulNBits(x, w.int4, scales)
    Gemm(x, table, transB=1)          the same
    Gather(table, ids)                GatherBlockQuantized over the same bytes and scales

`accuracy_level=4` lets the kernel quantize activations to int8, with a scale for each block of a
row, so no row depends on its neighbours. The tied table is stored once: the two operators need its
bytes in different shapes, so two initializers refer to the same range of the weight file.
Must not fire for a weight that is kept wider, or that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from neo_export.passes._block_operators import block_product, block_rows
from neo_export.passes._stored_weight import store_weights
from neo_export.passes._tensors import add_lazy_parts, alias_of, read, static_shape
from neo_export.quantize.int4 import check_block_size
from neo_export.quantize.quantizer import RoundToNearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["quantize_int4_weights"]

_BITS = 4
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class _Int4:
    """See the module."""

    plan: WeightPlan
    quantizer: WeightQuantizer

    def product(self, op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
        stored, scales, size = self._stored(weight)
        return block_product(
            op, x, stored, scales, bits=_BITS, block_size=size, accuracy_level=_INT8_ACTIVATIONS
        )

    def rows(self, op: Any, weight: ir.Value, ids: ir.Value) -> ir.Value:
        rows, columns = static_shape(weight)
        shape = (rows, columns // 2)
        table, scales, size = self._stored(weight, shape)
        if static_shape(table) != shape:  # the head reads it, too
            table = alias_of(table, f"{weight.name}.int4.rows", shape)
        return block_rows(op, table, ids, scales, bits=_BITS, block_size=size)

    def _stored(
        self, weight: ir.Value, shape: tuple[int, ...] | None = None
    ) -> tuple[ir.Value, ir.Value, int]:
        """Packed integers, scales and block size; made once for all readers of the weight.

        The first reader's `shape` becomes the shape of the integers; None is a product's shape.
        """
        graph, name = weight.graph, str(weight.name)
        assert graph is not None
        rows, columns = static_shape(weight)
        size = self.plan.of(name).block_size
        assert size is not None
        check_block_size(size, columns, name)
        blocks = columns // size
        packed_shape = shape or (rows, blocks, size // 2)

        def make() -> tuple[NDArray[Any], ...]:
            stored = self.quantizer.int4(name, read(weight), size)
            return stored.packed.reshape(packed_shape), stored.scales

        packed, scales = add_lazy_parts(
            graph,
            {
                f"{name}.int4": (ir.DataType.UINT8, packed_shape),
                f"{name}.int4.scales": (ir.DataType.FLOAT, (rows, blocks)),
            },
            make,
        )
        return packed, scales, size


def quantize_int4_weights(plan: WeightPlan, quantizer: WeightQuantizer | None = None) -> Pass:
    """The pass for the matrices that the plan stores in int4."""

    def quantize_int4(model: ir.Model) -> int:
        weights = _Int4(plan, quantizer or RoundToNearest())
        return store_weights(model, weights, lambda name: plan.of(name).kind == "int4")

    return quantize_int4
