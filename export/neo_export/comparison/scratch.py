"""Room for arrays that may be larger than the memory one would like to use."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["scratch_array"]

_LARGE = 1 << 24
"""Bytes from which on an array lies in a file."""


def scratch_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros. A large array is a mapping of a file without a name, in the temporary folder.

    The system writes it back when memory runs short, and drops it when the array is garbage.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < _LARGE:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(prefix="neo-diff-") as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)
