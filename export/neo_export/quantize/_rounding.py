"""Scales of least squared error, computed in slabs of rows that fit into the CPU's cache."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from neo_runtime.machine.cores import usable_processors
from numpy.typing import NDArray

__all__ = ["in_slabs", "search_scale"]

_SLAB = 1 << 17  # numbers: half a megabyte of float32

Quantizer = Callable[[NDArray[np.float32]], tuple[NDArray[Any], ...]]


def in_slabs(weight: NDArray[np.float32], quantize: Quantizer) -> tuple[NDArray[Any], ...]:
    """Apply `quantize` to slabs of rows of `weight` [rows, columns], and concatenate the results.

    numpy releases the GIL, so the slabs run on all cores.
    """
    rows = max(1, _SLAB // weight.shape[1])
    slabs = [weight[start : start + rows] for start in range(0, len(weight), rows)]
    if len(slabs) == 1:
        return quantize(weight)
    with ThreadPoolExecutor(usable_processors()) as pool:
        parts = list(pool.map(quantize, slabs))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def search_scale(
    groups: NDArray[np.float32],
    base: NDArray[np.float32],
    low: int,
    high: int,
    factors: tuple[float, ...],
) -> NDArray[np.float32]:
    """Find each group's scale of least squared error among `base` × `factors`, then refine it.

    Args:
        groups: [n, size] numbers that share a scale.
        base: [n, 1] the scale of plain rounding, never 0.
        low: smallest integer.
        high: largest integer.
        factors: candidates. They include 1.0, so the result is never worse than plain rounding.

    Returns:
        [n, 1] scales. The refinement is the least-squares scale for the chosen integers,
        Σ w·q / Σ q², used where it lowers the error further.
    """
    best = base.copy()
    least = _error(groups, base, low, high)
    for factor in factors:
        if factor == 1:
            continue
        scale = base * np.float32(factor)
        error = _error(groups, scale, low, high)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    integers = np.clip(np.rint(groups / best), low, high)
    power = np.sum(integers * integers, axis=1, keepdims=True)
    fitted = np.sum(groups * integers, axis=1, keepdims=True) / np.maximum(power, 1)
    fitted = np.where(power > 0, fitted, best).astype(np.float32)
    fitted[fitted == 0] = best[fitted == 0]
    better = _error(groups, fitted, low, high) < least
    best[better] = fitted[better]
    return best


def _error(
    groups: NDArray[np.float32], scale: NDArray[np.float32], low: int, high: int
) -> NDArray[np.float32]:
    wide = np.repeat(scale, groups.shape[1], axis=1)  # broadcasting over short rows is slow
    integers = groups / wide
    np.rint(integers, out=integers)
    np.clip(integers, low, high, out=integers)
    integers *= wide
    integers -= groups
    integers *= integers
    # Not einsum: its order of summation, and so the bundle's bytes, would depend on the processor.
    result: NDArray[np.float32] = integers.sum(axis=1, keepdims=True)
    return result
