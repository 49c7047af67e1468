"""What all programs have in common: when they begin, and who ends a sum."""

# ruff: noqa: N803 - constants of a program are upper case, as in Triton's own

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["arrived_last", "let_next_begin", "moments", "wait_for_earlier"]


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Let the next launch load its weights."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):
    """Until everything that was launched before has ended."""
    if PDL:
        gdc_wait()


@triton.jit
def arrived_last(counter, parts):
    """Whether all other programs of a sum have left their parts; what they left can be read."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1


@triton.jit
def moments(x, h, WIDTH: tl.constexpr, EPSILON: tl.constexpr):
    """Mean and 1 / standard deviation of a row, `x` zero outside of it."""
    mean = tl.sum(x, 0) / WIDTH
    apart = tl.where(h < WIDTH, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(apart * apart, 0) / WIDTH + EPSILON)
