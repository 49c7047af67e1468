"""The integer levels that weights are rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FARTHEST", "Levels"]

FARTHEST = {"int4": 0.5, "int8": 0.1, "fp8": 0.1}
"""Largest plausible ‖W − stored‖ / ‖W‖ of a quantized matrix. Rounding gives 0.15, 0.01 and 0.03;
GPTQ, which changes weights more, at most 0.22 (int4) and 0.02 (int8). A wrong matrix gives 1.4,
zeros give 1."""


@dataclass(frozen=True)
class Levels:
    """The integers `low` … `high`, which are multiplied by the scale of their block."""

    low: int
    high: int
    factors: tuple[float, ...]
    """Candidates for a scale, as multiples of the scale of plain rounding."""

    def base(self, group: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale of plain rounding for groups [size, n]: [n], never 0.

        If there is one more negative level, the scale's sign lets the largest number use it.
        """
        at = np.abs(group).argmax(axis=0)
        largest = np.take_along_axis(group, at[None], axis=0)[0]
        if self.low == -self.high:
            largest = -np.abs(largest)
        scale = largest / np.float32(self.low)
        return np.where(scale == 0, np.float32(1), scale)

    def round(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Round to the nearest integer of the range, in float32."""
        rounded = np.rint(numbers)
        return np.clip(rounded, self.low, self.high, out=rounded)
