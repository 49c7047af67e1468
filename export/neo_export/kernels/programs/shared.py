"""Parts that programs share: dependent launch, the end of a split sum, layer norm statistics."""

# ruff: noqa: N803 - constexpr parameters are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["arrived_last", "let_next_begin", "moments", "wait_for_earlier"]


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Let the next launch start; it loads its weights while this one runs."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):
    """Wait until all earlier launches have ended and their writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def arrived_last(counter, parts):
    """Count this program; True in the last of `parts`, which can then read all partial results."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1


@triton.jit
def moments(x, h, WIDTH: tl.constexpr, EPSILON: tl.constexpr):
    """Mean and 1 / sqrt(variance + EPSILON) of a row `x` of WIDTH elements, padded with zeros."""
    mean = tl.sum(x, 0) / WIDTH
    apart = tl.where(h < WIDTH, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(apart * apart, 0) / WIDTH + EPSILON)
