"""Attention of a new position over the cache."""

# ruff: noqa: N803 - constants of a program are upper case, as in Triton's own

from __future__ import annotations

import triton
import triton.language as tl

from neo_export.kernels.programs.shared import arrived_last, let_next_begin, wait_for_earlier

__all__ = ["attend"]


@triton.jit
def attend(
    queries,
    keys,
    values,
    position_ids,
    out,
    parts,
    counters,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of one new position, half [rows, HEADS * HEAD_DIM]. Grid: (rows * HEADS, splits).

    queries     float32 [rows, HEADS * HEAD_DIM]
    keys        half [rows, HEADS, length, HEAD_DIM], the new position's among them; values, too
    WINDOW      positions that are seen, the new one included; 0: all
    parts       float32 [rows * HEADS, splits, BLOCK_D + 2]: sum, largest score, sum of weights
    counters    int32 [rows * HEADS]

    Softmax over pieces as in FlashAttention-2 (Dao, 2023), section 3.1.
    """
    let_next_begin(PDL)
    place, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = place // HEADS
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    wait_for_earlier(PDL)
    end = tl.load(position_ids + row).to(tl.int32) + 1
    first = 0
    if WINDOW > 0:
        first = tl.maximum(end - WINDOW, 0)
    at = first + split * CHUNK + c
    inside = (at < end)[:, None] & (d < HEAD_DIM)[None, :]
    offset = (place.to(tl.int64) * length + at[:, None]) * HEAD_DIM + d[None, :]
    query = tl.load(queries + place * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    key = tl.load(keys + offset, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(values + offset, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(at < end, tl.sum(query[None, :] * key, 1) * SCALE, float("-inf"))
    # A program behind the end has no position; -inf - -inf would be NaN.
    largest = tl.maximum(tl.max(score, 0), -3.0e38)
    weight = tl.exp(score - largest)
    part = parts + (place * splits + split) * (BLOCK_D + 2)
    tl.store(part + d, tl.sum(weight[:, None] * value, 0))
    tl.store(part + BLOCK_D, largest)
    tl.store(part + BLOCK_D + 1, tl.sum(weight, 0))
    if arrived_last(counters + place, splits):
        part = parts + place * splits * (BLOCK_D + 2)
        top = -3.0e38
        for other in range(splits):
            found = tl.load(part + other * (BLOCK_D + 2) + BLOCK_D, cache_modifier=".cg")
            top = tl.maximum(top, found)
        total, mass = tl.zeros([BLOCK_D], tl.float32), 0.0
        for other in range(splits):
            one = part + other * (BLOCK_D + 2)
            by = tl.exp(tl.load(one + BLOCK_D, cache_modifier=".cg") - top)
            total += by * tl.load(one + d, cache_modifier=".cg")
            mass += by * tl.load(one + BLOCK_D + 1, cache_modifier=".cg")
        attended = (total / mass).to(out.dtype.element_ty)
        tl.store(out + place * HEAD_DIM + d, attended, mask=d < HEAD_DIM)
        tl.store(counters + place, 0)
