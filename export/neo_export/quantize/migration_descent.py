"""Improves a migration scale by gradient descent on the expected error of a rounded product.

`neo_export.quantize.migration_search` defines the error E(s).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["descended", "normalized", "positive"]

Array = Any

_STEPS = 40
_NORM = 16
"""A p-norm of this order replaces the maximum, to make it differentiable."""


def descended(
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    start: Array,
    block: int,
    weight_limit: int,
) -> NDArray[np.float32]:
    """Minimize E(s) over log s.

    Args:
        x: [n, C] activations.
        w: [out, C] weights.
        start: [C] the s to start from.
        block: consecutive channels that share a rounding step.
        weight_limit: largest integer of a weight.
    """
    x_blocks = np.abs(x).reshape(len(x), -1, block)
    w_blocks = np.abs(w).reshape(len(w), -1, block)
    x_power = (x_blocks.astype(np.float64) ** 2).mean(axis=0)
    w_power = (w_blocks.astype(np.float64) ** 2).sum(axis=0)
    log = np.log(positive(start)).reshape(-1, block)
    best, least = log, np.inf
    for step in range(_STEPS):
        scale = np.exp(log).astype(np.float32)
        x_max, x_share = _soft_max(x_blocks / scale)
        w_max, w_share = _soft_max(w_blocks * scale)
        w_energy, x_energy = w_power * scale**2, x_power / scale**2
        of_x = x_max.mean(axis=0) * w_energy.sum(axis=-1) / 127**2
        of_w = w_max.sum(axis=0) * x_energy.sum(axis=-1) / weight_limit**2
        total = float(np.sum(of_x + of_w))
        if total < least:
            best, least = log, total
        slope_x = _portion(w_energy) - _weighted(x_share, x_max)
        slope_w = _weighted(w_share, w_max) - _portion(x_energy)
        slope = of_x[:, None] * slope_x + of_w[:, None] * slope_w
        rate = (0.5 if step < _STEPS // 2 else 0.15) / max(float(np.abs(slope).max()), 1e-30)
        log = log - rate * slope
    return normalized(np.exp(best).reshape(-1))


def _soft_max(values: NDArray[np.float32]) -> tuple[Array, Array]:
    """Square of the smooth maximum along the last axis [n, blocks], and each entry's share."""
    top = np.maximum(values.max(axis=-1, keepdims=True), 1e-30)
    power = values / top
    for _ in range(_NORM.bit_length() - 1):
        power *= power
    total = np.maximum(power.sum(axis=-1, keepdims=True), 1e-30)
    largest = (top * total ** np.float32(1 / _NORM))[..., 0].astype(np.float64)
    return largest**2, power / total


def _portion(energy: Array) -> Array:
    return energy / np.maximum(energy.sum(axis=-1, keepdims=True), 1e-30)


def _weighted(share: Array, largest: Array) -> Array:
    """Mean of [n, blocks, size] over n, with the weights [n, blocks]."""
    total = np.einsum("nbc,nb->bc", share, largest.astype(np.float32))
    return total / np.maximum(largest.sum(axis=0), 1e-30)[:, None]


def positive(values: Array) -> Array:
    """The values in float64, never 0: a zero channel gets the smallest value of the others."""
    values = np.asarray(values, np.float64)
    floor = values[values > 0].min() if (values > 0).any() else 1.0
    return np.maximum(values, max(floor, 1e-5 * values.max()))


def normalized(scale: Array) -> NDArray[np.float32]:
    """The scale with geometric mean 1: only ratios matter."""
    result: NDArray[np.float32] = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
    return result
