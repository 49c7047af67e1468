"""Embeddings of new tokens, and the layer norm of the residual stream."""

# ruff: noqa: N803 - constexpr parameters are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from neo_export.kernels.programs.shared import let_next_begin, moments, wait_for_earlier

__all__ = ["embed", "normalize"]


@triton.jit
def _row_of(table, scales, row, h, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Elements `h` of one table row, dequantized to float32."""
    inside = h < WIDTH
    if BITS == 16:
        return tl.load(table + row * WIDTH + h, mask=inside, other=0.0).to(tl.float32)
    packed = tl.load(table + (row * WIDTH + h) * BITS // 8, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        packed = (packed >> (4 * (h % 2))) & 15
    scale = tl.load(scales + (row * WIDTH + h) // GROUP, mask=inside, other=0.0).to(tl.float32)
    return (packed - (1 << (BITS - 1))).to(tl.float32) * scale


@triton.jit
def embed(
    input_ids,
    position_ids,
    table,
    scales,
    positions,
    residual,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Start the residual stream: token plus position embedding of a row. Grid: (rows)."""
    let_next_begin(PDL)
    row, h = tl.program_id(0), tl.arange(0, BLOCK)
    wait_for_earlier(PDL)
    token, position = tl.load(input_ids + row), tl.load(position_ids + row)
    total = _row_of(table, scales, token, h, WIDTH, BITS, GROUP)
    total += _row_of(positions, scales, position, h, WIDTH, 16, 1)
    tl.store(residual + row * WIDTH + h, total, mask=h < WIDTH)


@triton.jit
def normalize(
    residual,
    gamma,
    beta,
    out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
    PDL: tl.constexpr,
):
    """Layer norm of each row of the residual stream; `out` is half [rows, WIDTH]. Grid: (rows)."""
    let_next_begin(PDL)
    row, h = tl.program_id(0), tl.arange(0, BLOCK)
    scale = tl.load(gamma + h, mask=h < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(beta + h, mask=h < WIDTH, other=0.0).to(tl.float32)
    wait_for_earlier(PDL)
    x = tl.load(residual + row * WIDTH + h, mask=h < WIDTH, other=0.0)
    mean, spread = moments(x, h, WIDTH, EPSILON)
    normal = (x - mean) * spread * scale + shift
    tl.store(out + row * WIDTH + h, normal.to(out.dtype.element_ty), mask=h < WIDTH)
