"""Refines scales and integers in turn, with the other fixed; tr(dW H dWᵀ) never rises.

All arrays are those of Wᵀ, [in, n], so that what belongs to one input is contiguous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.quantize.levels import Levels
    from neo_export.quantize.own_inputs import OwnInputs

__all__ = ["descend", "fit_scales"]

_PANEL = 128


def fit_scales(
    weight: NDArray[np.float32],
    integers: NDArray[np.float32],
    scales: NDArray[np.float32],
    moment: NDArray[np.float32],
    own: OwnInputs | None,
) -> NDArray[np.float32]:
    """Each row's scales of least error for these integers, from the normal equations.

    Args:
        weight: [in, n].
        integers: [in, n].
        scales: [in / size, n], the current ones.
        moment: [in, in] H.
        own: inputs that count for single rows of the n, in addition to H.

    Returns:
        [in / size, n].
    """
    blocks, count = scales.shape
    size = len(weight) // blocks
    cut = integers.reshape(blocks, size, count)
    wanted = (moment @ weight).reshape(cut.shape)
    right = np.einsum("bsn,bsn->nb", cut, wanted).astype(np.float64)
    normal = np.empty((count, blocks, blocks))
    for b in range(blocks):
        through = moment[:, b * size : (b + 1) * size] @ cut[b]
        normal[:, :, b] = np.einsum("bsn,bsn->nb", cut, through.reshape(cut.shape))
    if own is not None:
        _add_own(normal, right, weight, integers, own)
    at = np.arange(blocks)
    empty = normal[:, at, at] <= 0  # a block of zeros keeps its scale
    normal[:, at, at] = normal[:, at, at] * (1 + 1e-6) + empty
    right += empty * scales.T
    found = np.linalg.solve(normal, right[..., None])[..., 0].T.astype(np.float32)
    return np.where(np.isfinite(found) & (found != 0), found, scales)


def _add_own(
    normal: NDArray[np.float64],
    right: NDArray[np.float64],
    weight: NDArray[np.float32],
    integers: NDArray[np.float32],
    own: OwnInputs,
) -> None:
    """Add each row's own inputs to its normal equations, [n, blocks, blocks] and [n, blocks]."""
    blocks = normal.shape[1]
    for row in np.flatnonzero(np.diff(own.starts)).tolist():
        inputs, weights = own.row(row)
        products = inputs * integers[:, row, None]
        sums = products.reshape(blocks, -1, len(weights)).sum(axis=1)
        weighted = sums * weights
        normal[row] += weighted @ sums.T
        right[row] += weighted @ (weight[:, row] @ inputs)


def descend(
    weight: NDArray[np.float32],
    integers: NDArray[np.float32],
    scales: NDArray[np.float32],
    moment: NDArray[np.float32],
    own: OwnInputs | None,
    levels: Levels,
) -> None:
    """Set each integer in turn to its optimum with all others fixed; changes `integers` in place.

    Arguments are those of `fit_scales`, and the levels.
    """
    inputs = len(weight)
    size = inputs // len(scales)
    off = weight - integers * np.repeat(scales, size, axis=0)
    extra = None if own is None else _OwnErrors(own, off)
    for start in range(0, inputs, _PANEL):
        part = slice(start, min(inputs, start + _PANEL))
        pull = moment[part] @ off
        within = moment[part, part]
        for j in range(part.stop - part.start):
            column, scale = start + j, scales[(start + j) // size]
            gradient, curvature = pull[j], within[j, j]
            if extra is not None:
                slope, bend = extra.at(column)
                gradient, curvature = gradient + slope, curvature + bend
            better = levels.round(integers[column] + gradient / (curvature * scale))
            step = (better - integers[column]) * scale
            integers[column] = better
            off[column] -= step
            pull -= within[:, j, None] * step
            if extra is not None:
                extra.move(step)


class _OwnErrors:
    """The errors dw · x of each row's own inputs, kept up to date."""

    def __init__(self, own: OwnInputs, off: NDArray[np.float32]) -> None:
        self._own, self._counts = own, np.diff(own.starts)
        self._rows = np.flatnonzero(self._counts)  # reduceat cannot sum empty groups
        self._errors = np.empty(len(own.which), np.float32)
        for row in self._rows:
            part = slice(own.starts[row], own.starts[row + 1])
            self._errors[part] = off[:, row] @ own.inputs[:, own.which[part]]

    def at(self, column: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Σ weight · error · x and Σ weight · x² of each row, x the input of one column: [n]."""
        self._values = self._own.inputs[column][self._own.which]
        weighted = self._own.weights * self._values
        return self._sums(weighted * self._errors), self._sums(weighted * self._values)

    def move(self, step: NDArray[np.float32]) -> None:
        """Subtract `step` [n] from W − Q in the column of the last call of `at`."""
        self._errors -= self._values * np.repeat(step, self._counts)

    def _sums(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        found = np.zeros(len(self._counts), np.float32)
        found[self._rows] = np.add.reduceat(numbers, self._own.starts[self._rows])
        return found
