"""The largest logits of the vocabulary, selected in two launches."""

# ruff: noqa: N803 - constexpr parameters are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from neo_export.kernels.programs.shared import let_next_begin, wait_for_earlier

__all__ = ["best_of_all", "best_of_block"]


@triton.jit
def best_of_block(
    logits,
    keys,
    sums,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The COUNT_BLOCK largest logits of a block of the vocabulary, in order. Grid: (blocks, rows).

    logits      float32 [rows, VOCAB]
    keys        int64 [rows, blocks, COUNT_BLOCK]: in the upper 32 bits the logit, mapped to an
                integer of the same order; in the lower 0x7FFFFFFF - id, so that of equal logits
                the lower id comes first
    sums        float64 [rows, blocks, 2]: largest logit, and the sum of exp(logit - largest)
    """
    let_next_begin(PDL)
    block, row, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_earlier(PDL)
    logit = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
    # NaN ranks first whatever its sign. Ranked last, it could fall behind the padding of the block.
    bits = tl.where(logit == logit, logit.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    best = tl.topk(key, COUNT_BLOCK)
    place = row * blocks + block
    tl.store(keys + place * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK), best)
    largest = tl.maximum(tl.max(logit, 0), -3.0e38)
    tl.store(sums + place * 2, largest.to(tl.float64))
    tl.store(sums + place * 2 + 1, tl.sum(tl.exp(logit - largest).to(tl.float64), 0))


@triton.jit
def best_of_all(
    keys,
    sums,
    logits,
    top_values,
    top_ids,
    exp_sum,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The COUNT largest logits of a row, and its sum of exp(logit - largest). Grid: (rows).

    keys, sums  see `best_of_block`
    top_values  float32 [rows, COUNT]
    top_ids     int64 [rows, COUNT]
    exp_sum     float64 [rows]
    """
    let_next_begin(PDL)
    row = tl.program_id(0)
    i, b = tl.arange(0, BLOCKS_BLOCK * COUNT_BLOCK), tl.arange(0, BLOCKS_BLOCK)
    wait_for_earlier(PDL)
    lowest = -0x7FFFFFFFFFFFFFFF - 1
    size: tl.constexpr = BLOCKS * COUNT_BLOCK
    key = tl.load(keys + row * size + i, mask=i < size, other=lowest)
    token = 0x7FFFFFFF - (tl.topk(key, COUNT_BLOCK) & 0x7FFFFFFF)
    c = tl.arange(0, COUNT_BLOCK)
    place = row * COUNT + c
    tl.store(top_ids + place, token, mask=c < COUNT)
    logit = tl.load(logits + row * VOCAB + token, mask=c < COUNT)
    tl.store(top_values + place, logit, mask=c < COUNT)
    block = sums + row * BLOCKS * 2 + b * 2
    largest = tl.load(block, mask=b < BLOCKS, other=-3.0e38)
    mass = tl.load(block + 1, mask=b < BLOCKS, other=0.0)
    tl.store(exp_sum + row, tl.sum(mass * tl.exp(largest - tl.max(largest, 0)), 0))
