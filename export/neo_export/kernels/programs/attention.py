"""Attention of one new position over the cache, split along the positions."""

# ruff: noqa: N803 - constexpr parameters are upper case, as is usual in Triton

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
    MERGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of one new position per row. Grid: (rows * HEADS, splits).

    queries     float32 [rows, HEADS * HEAD_DIM]
    keys        half [rows, HEADS, length, HEAD_DIM], the new position's included; values likewise
    WINDOW      positions that the query attends to, its own included; 0: all
    out         half [rows, HEADS * HEAD_DIM]
    parts       float32 [rows * HEADS, splits, BLOCK_D + 4]: weighted sum of values, largest score,
                sum of weights, and two unused elements (16-byte alignment)
    counters    int32 [rows * HEADS]

    Each program computes the softmax of CHUNK positions; the last one merges the partial results
    (online softmax: FlashAttention-2, Dao, 2023, section 3.1).
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
    # The grid covers the whole cache buffer: programs past the sequence's end have no work.
    live = tl.cdiv(end - first, CHUNK)
    if split < live:
        at = first + split * CHUNK + c
        inside = (at < end)[:, None] & (d < HEAD_DIM)[None, :]
        offset = (place.to(tl.int64) * length + at[:, None]) * HEAD_DIM + d[None, :]
        query = tl.load(queries + place * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        key = tl.load(keys + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(values + offset, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(at < end, tl.sum(query[None, :] * key, 1) * SCALE, float("-inf"))
        largest = tl.max(score, 0)
        weight = tl.exp(score - largest)
        first_part = parts + place * splits * (BLOCK_D + 4)
        part = first_part + split * (BLOCK_D + 4)
        tl.store(part + d, tl.sum(weight[:, None] * value, 0))
        tl.store(part + BLOCK_D, largest)
        tl.store(part + BLOCK_D + 1, tl.sum(weight, 0))
        if arrived_last(counters + place, live):
            attended = merged(first_part, live, BLOCK_D, MERGE)
            tl.store(
                out + place * HEAD_DIM + d, attended.to(out.dtype.element_ty), mask=d < HEAD_DIM
            )
            tl.store(counters + place, 0)


@triton.jit
def merged(parts, live, BLOCK_D: tl.constexpr, MERGE: tl.constexpr):
    """Attention output from the `live` partial results of one head: float32 [BLOCK_D].

    MERGE       partial results loaded per iteration. Each iteration waits for the L2 cache, since
                the loads bypass L1, which may hold stale data
    """
    d = tl.arange(0, BLOCK_D)
    top, mass, total = -3.0e38, 0.0, tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, live, MERGE):
        piece = start + tl.arange(0, MERGE)
        there = piece < live
        part = parts + piece * (BLOCK_D + 4)
        largest = tl.load(part + BLOCK_D, mask=there, other=-3.0e38, cache_modifier=".cg")
        weights = tl.load(part + BLOCK_D + 1, mask=there, other=0.0, cache_modifier=".cg")
        sums = tl.load(
            part[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(top, tl.max(largest, 0))
        by, before = tl.exp(largest - higher), tl.exp(top - higher)
        total = total * before + tl.sum(by[:, None] * sums, 0)
        mass = mass * before + tl.sum(by * weights, 0)
        top = higher
    return total / mass
