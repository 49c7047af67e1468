"""Where the arrays of a cache on the CPU lie: one block of memory, used again by the next cache."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.backends.cpu.unused_memory import forget_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["KeptBlock", "aligned_arrays", "aligned_size", "aligned_zeros"]

_PAGE = 4096


class KeptBlock:
    """The memory of the cache that was closed last. Safe for threads.

    Pages that the system hands out are zeroed when they are first written, which is a good part
    of a short prompt's time. A server that answers one request after the other spares it so.
    """

    def __init__(self) -> None:
        # A cache that becomes garbage is closed at any moment, within a call of this class too.
        self._lock = threading.RLock()
        self._block: NDArray[np.uint8] | None = None
        self._closed = False

    def take(self, size: int) -> NDArray[np.uint8]:
        """Memory of at least `size` bytes; what is in it is of no meaning.

        Of a longer block only so much stays in memory: callers keep account of what they ask for.

        Raises:
            MemoryError: the system has no more.
        """
        with self._lock:
            block, self._block = self._block, None
        if block is not None and size <= len(block) and forget_bytes(block, size):
            return block
        del block  # before new memory is asked for
        # Zeros of a large block come page by page as they are written, so its rest costs nothing.
        return np.zeros(size, dtype=np.uint8)

    def keep(self, block: NDArray[np.uint8]) -> None:
        """Keep this block, which nothing else uses any more, instead of the one before."""
        with self._lock:
            self._block = None if self._closed else block

    def close(self) -> None:
        """Free the memory; that of open caches goes when they are closed."""
        with self._lock:
            self._closed, self._block = True, None


def aligned_size(shapes: Sequence[tuple[int, ...]], dtype: str) -> int:
    """Bytes of a block for `aligned_arrays`."""
    return sum(_strides(shapes, dtype)) + _PAGE


def aligned_arrays(
    block: NDArray[np.uint8], shapes: Sequence[tuple[int, ...]], dtype: str
) -> list[NDArray[np.generic]]:
    """Arrays of these shapes in a block of memory, each at the beginning of a page."""
    kind = np.dtype(dtype)
    offset = -block.ctypes.data % _PAGE
    arrays: list[NDArray[np.generic]] = []
    for shape, stride in zip(shapes, _strides(shapes, dtype), strict=True):
        size = math.prod(shape) * kind.itemsize
        arrays.append(block[offset : offset + size].view(kind).reshape(shape))
        offset += stride
    return arrays


def aligned_zeros(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[NDArray[np.generic]]:
    """The same in new memory of zeros."""
    return aligned_arrays(np.zeros(aligned_size(shapes, dtype), np.uint8), shapes, dtype)


def _strides(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[int]:
    itemsize = np.dtype(dtype).itemsize
    sizes = [math.prod(shape) * itemsize for shape in shapes]
    return [-(-size // _PAGE) * _PAGE for size in sizes]
