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

from neo_runtime.backends.cpu.c_library import c_function
from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Mapping", "clean_mappings", "forget_bytes", "forget_pages", "mapped_within"]

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \S+ +(.*)")
_IN_MEMORY = re.compile(r"^Rss: +[1-9]", re.MULTILINE)
_MADV_DONTNEED = 4
_one_at_a_time = threading.Lock()


def _renew_the_lock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


in_every_child(_renew_the_lock)


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
    return [mapping for mapping, is_clean in _mappings("smaps", *files) if is_clean]


@contextmanager
def mapped_within(file: Path, lasting: Path) -> Iterator[list[Mapping]]:
    """Collect what the block maps of a file: filled when it ends, without an error.

    Mappings that somebody else made may go at any time, and other memory may come to lie at their
    addresses. So blocks run one at a time, and what was there before is left out.

    Args:
        file: what the block maps.
        lasting: a file that stays mapped to the end; the list holds all of it, too.
    """
    found: list[Mapping] = []
    with _one_at_a_time:
        others = {mapping for mapping, _ in _mappings("maps", file)}
        yield found
        found += [mapping for mapping in clean_mappings(file, lasting) if mapping not in others]


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


def _mappings(name: str, *files: Path) -> Iterator[tuple[Mapping, bool]]:
    """This process's mappings of files, and whether one is known to hold nothing but its file.

    "smaps" knows, after a look at every page (30 ms at the 1.3B shape); "maps" is quick.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        text = Path("/proc/self", name).read_text("utf-8", "surrogateescape")
    except OSError:  # some sandboxes have none
        return
    # QEMU, where containers for other processors are built, writes the file itself: all is zero.
    is_true = _IN_MEMORY.search(text) is not None
    wanted = {str(path): path for path in (file.resolve() for file in files)}
    mapping, is_clean = None, False
    for line in text.splitlines():
        if match := _MAPPING.fullmatch(line):
            if mapping is not None:
                yield mapping, is_clean
            mapping, is_clean = None, False
            if (path := wanted.get(match[4])) is not None:  # there may be a thousand others
                start, stop, offset = (int(match[group], 16) for group in (1, 2, 3))
                mapping = Mapping(path, offset, start, stop - start)
        elif line.startswith("Anonymous:"):
            is_clean = is_true and line.split()[1] == "0"
    if mapping is not None:
        yield mapping, is_clean
