"""Pages of memory that are not needed any more go back to the system.

What only loading or a prompt read of mapped files stays with the process, and so does what lies
behind the part of a block that is in use. Servers that run several processes want both back.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.backends.c_library import c_function

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Mapping", "clean_mappings", "forget_bytes", "forget_pages", "mapped_within"]

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \S+ +(.*)")
_MADV_DONTNEED = 4
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Mapping:
    """Part of a file in this process's memory that holds nothing but the file."""

    path: Path
    offset: int
    """Of its first byte in the file."""
    start: int
    """Its address."""
    size: int
    """Bytes."""


def clean_mappings(*files: Path) -> list[Mapping]:
    """What this process has mapped of some files, and has not written to (Linux; else nothing)."""
    wanted = {path.resolve() for path in files}
    return [mapping for mapping in _all_clean() if mapping.path in wanted]


@contextmanager
def mapped_within(*files: Path) -> Iterator[list[Mapping]]:
    """Collect what the block maps of some files: filled when it ends, without an error.

    Mappings that somebody else made may go at any time, and other memory may come to lie at their
    addresses. So blocks run one at a time, and what was there before is left out.
    """
    found: list[Mapping] = []
    with _one_at_a_time:
        before = set(clean_mappings(*files))
        yield found
        found += [mapping for mapping in clean_mappings(*files) if mapping not in before]


def forget_pages(mappings: Iterable[Mapping]) -> None:
    """Take pages of mapped files out of this process, where the system can (Linux).

    Nothing is lost: a page that is read again is mapped again, from the system's file cache if it
    still is there.

    Args:
        mappings: that are there still, because whoever made them does not let go meanwhile; other
            memory at their addresses would be emptied.
    """
    advise = c_function("madvise")
    if advise is None:
        return
    for mapping in mappings:
        advise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size), _MADV_DONTNEED)


def forget_bytes(block: NDArray[np.uint8], start: int) -> bool:
    """Give whole pages of an array back, from byte `start` on; they become zeros (Linux).

    Returns:
        Whether that was done, or there was nothing to do.
    """
    first = block.ctypes.data + start
    first += -first % mmap.PAGESIZE
    size = block.ctypes.data + block.nbytes - first
    size -= size % mmap.PAGESIZE
    if size <= 0:
        return True
    advise = c_function("madvise")
    if advise is None:
        return False
    return bool(advise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_DONTNEED) == 0)


def _all_clean() -> Iterator[Mapping]:
    if not sys.platform.startswith("linux"):
        return
    try:
        lines = Path("/proc/self/smaps").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # some sandboxes have none
        return
    mapping = None
    for line in lines:
        if match := _MAPPING.fullmatch(line):
            start, stop, offset = (int(match[group], 16) for group in (1, 2, 3))
            mapping = Mapping(Path(match[4]), offset, start, stop - start)
        elif line.startswith("Anonymous:") and line.split()[1] == "0" and mapping is not None:
            yield mapping
