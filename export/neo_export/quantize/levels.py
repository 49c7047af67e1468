"""The numbers that a weight may become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FARTHEST", "Levels"]

FARTHEST = {"int4": 0.5, "int8": 0.1, "fp8": 0.1}
"""‖W − stored‖ / ‖W‖ that quantization may have. Rounding comes to 0.15, 0.01 and 0.03, GPTQ, which
moves weights farther, to 0.22 and 0.02 at most; another matrix in its place gives 1.4, zeros 1."""


@dataclass(frozen=True)
class Levels:
    """What a number may become: integers `low` … `high`, times the scale of its block."""

    low: int
    high: int
    factors: tuple[float, ...]
    """Candidates for a scale, in multiples of the one of plain rounding."""

    def base(self, group: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale of plain rounding for groups [size, n]: [n], never 0.

        Where there is one more negative level, the largest number gets it.
        """
        at = np.abs(group).argmax(axis=0)
        largest = np.take_along_axis(group, at[None], axis=0)[0]
        if self.low == -self.high:
            largest = -np.abs(largest)
        scale = largest / np.float32(self.low)
        return np.where(scale == 0, np.float32(1), scale)

    def round(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """To the nearest integer of the range, in float32."""
        rounded = np.rint(numbers)
        return np.clip(rounded, self.low, self.high, out=rounded)
