"""onnxruntime's two operators on block-wise quantized weights: a product, and a row lookup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_export.passes._tensors import static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["block_product", "block_rows"]


def block_product(
    op: Any,
    x: ir.Value,
    stored: ir.Value,
    scales: ir.Value,
    *,
    bits: int,
    block_size: int,
    **attributes: int,
) -> ir.Value:
    """X · Wᵀ by MatMulNBits.

    Args:
        op: the builder.
        x: [..., in].
        stored: uint8 [out, in / block_size, bytes of a block].
        scales: [out, in / block_size].
        bits: bits of a weight.
        block_size: inputs that share a scale.
        attributes: further attributes of the operator.
    """
    rows, blocks, _ = static_shape(stored)
    product: ir.Value = op.MatMulNBits(
        x,
        stored,
        scales,
        K=blocks * block_size,
        N=rows,
        bits=bits,
        block_size=block_size,
        **attributes,
        _domain="com.microsoft",
    )
    return product


def block_rows(
    op: Any, table: ir.Value, ids: ir.Value, scales: ir.Value, *, bits: int, block_size: int
) -> ir.Value:
    """W[ids] by GatherBlockQuantized.

    Args:
        op: the builder.
        table: the same bytes as `stored` of `block_product`, uint8 [out, bytes of a row].
        ids: indices of rows, of any shape.
        scales: [out, in / block_size].
        bits: bits of a weight.
        block_size: inputs that share a scale.
    """
    rows: ir.Value = op.GatherBlockQuantized(
        table,
        ids,
        scales,
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
        _domain="com.microsoft",
    )
    return rows
