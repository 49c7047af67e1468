"""Memory-mapped scratch arrays, for data larger than the memory that should be used."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["drop_pages", "scratch_array", "take_room"]

_LARGE = 1 << 24
"""Arrays of at least this many bytes are memory-mapped."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


def scratch_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """An array of zeros; a large one is memory-mapped from an unnamed file in the temporary folder.

    The system writes it to disk if memory runs short, and frees it with the array.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < _LARGE:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(prefix="neo-onnx-") as file:
        take_room(file, size, tempfile.gettempdir())
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def take_room(file: IO[bytes], size: int, folder: str) -> None:
    """Extend a new file to this size, with disk space reserved for all of it.

    Otherwise, space in a memory-mapped file is allocated at the first write, and if the disk is
    full then, the process is killed.

    Raises:
        OutputError: there is not enough space.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not available on every system
        file.truncate(size)
    except OSError as error:
        if error.errno not in _NO_ROOM:  # this file system cannot reserve space
            file.truncate(size)
            return
        raise OutputError(
            f"{folder} has no room for {size / 1e6:,.0f} MB of hidden states ({error.strerror}); "
            "free space, or choose another folder"
        ) from error


def drop_pages(*arrays: NDArray[Any]) -> None:
    """Remove memory-mapped arrays from this process's resident memory.

    Nothing is lost: when read again, pages come from the page cache or the disk. Arrays in ordinary
    memory are left alone.
    """
    if _DONT_NEED is None:
        return
    for mapping in _mappings(arrays):
        mapping.madvise(_DONT_NEED)


def _mappings(arrays: Iterable[NDArray[Any]]) -> list[mmap.mmap]:
    """The mappings that hold the arrays, without duplicates."""
    found: dict[int, mmap.mmap] = {}
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and not base.closed:
            found[id(base)] = base
    return list(found.values())
