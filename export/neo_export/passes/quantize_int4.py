"""int4 weights in blocks.

    before                            after
    MatMul(x, Transpose(w))           MatMulNBits(x, w.int4, scales)
    Gemm(x, table, transB=1)          the same
    Gather(table, ids)                GatherBlockQuantized over the same bytes and scales

`accuracy_level=4` lets the kernel quantize activations to int8, a block of a row at a time, so
that no row depends on its neighbours. The tied table is stored once: the two operators want its
bytes in two shapes, so two initializers refer to one place of the weight file.
Must not fire for a weight that is kept wider, or that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from neo_export.passes._stored_weight import store_weights
from neo_export.passes._tensors import add_lazy_parts, alias_of, read, static_shape
from neo_export.quantize.int4 import check_block_size, quantize_int4

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.passes import Pass

__all__ = ["quantize_int4_weights"]

_BITS = 4
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class _Int4:
    """See the module."""

    block_size: int

    def product(self, op: Any, x: ir.Value, weight: ir.Value) -> ir.Value:
        rows, columns = static_shape(weight)
        packed, scales = _stored(weight, self.block_size)
        result: ir.Value = op.MatMulNBits(
            x,
            packed,
            scales,
            K=columns,
            N=rows,
            bits=_BITS,
            block_size=self.block_size,
            accuracy_level=_INT8_ACTIVATIONS,
            _domain="com.microsoft",
        )
        return result

    def rows(self, op: Any, weight: ir.Value, ids: ir.Value) -> ir.Value:
        rows, columns = static_shape(weight)
        packed, scales = _stored(weight, self.block_size)
        table = alias_of(packed, f"{weight.name}.int4.rows", (rows, columns // 2))
        embedded: ir.Value = op.GatherBlockQuantized(
            table,
            ids,
            scales,
            bits=_BITS,
            block_size=self.block_size,
            gather_axis=0,
            quantize_axis=1,
            _domain="com.microsoft",
        )
        return embedded


def _stored(weight: ir.Value, block_size: int) -> tuple[ir.Value, ir.Value]:
    """The weight's packed integers and scales; made once, however often it is read."""
    graph = weight.graph
    assert graph is not None
    rows, columns = static_shape(weight)
    check_block_size(block_size, columns, str(weight.name))
    blocks = columns // block_size

    def make() -> tuple[NDArray[Any], ...]:
        stored = quantize_int4(read(weight), block_size)
        return stored.packed, stored.scales

    packed, scales = add_lazy_parts(
        graph,
        {
            f"{weight.name}.int4": (ir.DataType.UINT8, (rows, blocks, block_size // 2)),
            f"{weight.name}.int4.scales": (ir.DataType.FLOAT, (rows, blocks)),
        },
        make,
    )
    return packed, scales


def quantize_int4_weights(block_size: int, keep: tuple[str, ...] = ()) -> Pass:
    """The pass, for all matrices but those whose names match one of the shell patterns `keep`."""

    def quantize_int4(model: ir.Model) -> int:
        return store_weights(model, _Int4(block_size), keep)

    return quantize_int4
