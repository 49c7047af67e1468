"""The length of the common prefix of two token sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["shared_length"]


def shared_length(
    one: Sequence[int] | NDArray[np.int64], other: Sequence[int] | NDArray[np.int64]
) -> int:
    """Number of leading token ids that are equal in both sequences."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differs[0]) if differs.size else most
