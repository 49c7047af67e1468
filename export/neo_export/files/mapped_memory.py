"""Arrays that lie in files: room for what is larger than the memory one would like to use."""

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
"""Bytes from which on an array lies in a file."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


def scratch_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros. A large array is a mapping of a file without a name, in the temporary folder.

    The system writes it back when memory runs short, and drops it when the array is garbage.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < _LARGE:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(prefix="neo-onnx-") as file:
        take_room(file, size, tempfile.gettempdir())
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def take_room(file: IO[bytes], size: int, folder: str) -> None:
    """Make a new file so long, with room on the disk for all of it.

    A hole in a mapped file is filled when it is written to, and where the disk is full then the
    process dies of it.

    Raises:
        OutputError: there is no room.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not every system has it
        file.truncate(size)
    except OSError as error:
        if error.errno not in _NO_ROOM:  # nor can every file system reserve
            file.truncate(size)
            return
        raise OutputError(
            f"{folder} has no room for {size / 1e6:,.0f} MB of hidden states ({error.strerror}); "
            "make some, or name another folder"
        ) from error


def drop_pages(*arrays: NDArray[Any]) -> None:
    """Take the files that arrays are mapped from out of this process's resident memory.

    Nothing is lost: what is read again is mapped again, from the system's cache or the disk.
    Arrays that lie in ordinary memory are left alone.
    """
    if _DONT_NEED is None:
        return
    for mapping in _mappings(arrays):
        mapping.madvise(_DONT_NEED)


def _mappings(arrays: Iterable[NDArray[Any]]) -> list[mmap.mmap]:
    """The files behind arrays, each once."""
    found: dict[int, mmap.mmap] = {}
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and not base.closed:
            found[id(base)] = base
    return list(found.values())
