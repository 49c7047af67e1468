"""Memory for KV caches on the CPU: one block per cache, reused by the next one."""

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
    """Keeps the memory of the cache that was closed last. Thread-safe.

    The kernel zeroes each new page on first write, which takes a good part of a short prompt's
    time. Reusing the block saves that for a server that answers one request after the other.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close a cache in the middle of a call here.
        self._lock = threading.RLock()
        self._block: NDArray[np.uint8] | None = None
        self._closed = False

    def take(self, size: int) -> NDArray[np.uint8]:
        """A block of at least `size` bytes with undefined contents.

        Pages of a longer block beyond `size` are released, because callers account for `size`
        bytes only.

        Raises:
            MemoryError: the system has too little memory.
        """
        with self._lock:
            block, self._block = self._block, None
        if block is not None and size <= len(block) and forget_bytes(block, size):
            return block
        del block  # free it before allocating
        # A large zeroed block takes physical memory only as its pages are written.
        return np.zeros(size, dtype=np.uint8)

    def keep(self, block: NDArray[np.uint8]) -> None:
        """Keep a block that nothing else uses; the previous one is freed."""
        with self._lock:
            self._block = None if self._closed else block

    def close(self) -> None:
        """Free the kept block; blocks of open caches are freed when those are closed."""
        with self._lock:
            self._closed, self._block = True, None


def aligned_size(shapes: Sequence[tuple[int, ...]], dtype: str) -> int:
    """Bytes of a block that has room for `aligned_arrays`."""
    return sum(_strides(shapes, dtype)) + _PAGE


def aligned_arrays(
    block: NDArray[np.uint8], shapes: Sequence[tuple[int, ...]], dtype: str
) -> list[NDArray[np.generic]]:
    """Arrays of these shapes in a block of memory, each aligned to a page."""
    kind = np.dtype(dtype)
    offset = -block.ctypes.data % _PAGE
    arrays: list[NDArray[np.generic]] = []
    for shape, stride in zip(shapes, _strides(shapes, dtype), strict=True):
        size = math.prod(shape) * kind.itemsize
        arrays.append(block[offset : offset + size].view(kind).reshape(shape))
        offset += stride
    return arrays


def aligned_zeros(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[NDArray[np.generic]]:
    """The same as `aligned_arrays`, in a new block of zeros."""
    return aligned_arrays(np.zeros(aligned_size(shapes, dtype), np.uint8), shapes, dtype)


def _strides(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[int]:
    itemsize = np.dtype(dtype).itemsize
    sizes = [math.prod(shape) * itemsize for shape in shapes]
    return [-(-size // _PAGE) * _PAGE for size in sizes]
