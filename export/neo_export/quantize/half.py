"""Whether numbers fit into float16."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["fits_float16"]

_ROUNDS_UP = 65520.0
"""From here on numbers round to infinity: the largest number, 65504, plus half a unit."""


def fits_float16(values: NDArray[np.float32]) -> bool:
    """Whether no number becomes infinite in float16; NaN is allowed."""
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    return not largest >= _ROUNDS_UP
