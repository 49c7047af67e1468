"""Medians, percentiles and ratios of rounds: pure functions over seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Spread", "percentile", "round_ratios", "spread"]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range of the values of several rounds."""

    median: float
    min: float
    max: float

    def told(self, digits: int) -> str:
        """Median and range as text, for a table's cell."""
        return f"{self.median:.{digits}f} ({self.min:.{digits}f} to {self.max:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest.

    Raises:
        RequestError: no values.
    """
    if not values:
        raise RequestError("no rounds were measured; give -r at least 1")
    return Spread(median=median(values), min=min(values), max=max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks (numpy's default method).

    Args:
        values: at least one.
        percent: 0 to 100.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def round_ratios(others: Sequence[float], ours: Sequence[float]) -> list[float]:
    """The other's time / our time, round by round: above 1, ours is faster.

    Raises:
        RequestError: the numbers of rounds differ.
    """
    if len(others) != len(ours):
        raise RequestError(f"{len(others)} rounds of one and {len(ours)} of the other")
    return [other / our for other, our in zip(others, ours, strict=True)]
