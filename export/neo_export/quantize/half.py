"""What float16 holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["fits_float16"]

_ROUNDS_UP = 65520.0
"""From half a unit past the largest number (65504) on a number rounds to infinity."""


def fits_float16(values: NDArray[np.float32]) -> bool:
    """Whether no number becomes infinite; NaN fits."""
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    return not largest >= _ROUNDS_UP
