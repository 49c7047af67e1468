"""Release pages that are no longer needed, by `madvise(MADV_DONTNEED)` on Linux.

Two kinds stay resident otherwise: pages of memory-mapped files that were read only while loading or
for a prompt, and pages beyond the part of a block that is in use. Servers that run several
processes need that memory.
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
    """A part of a file that is mapped into this process."""

    path: Path
    offset: int
    """Offset of the first byte in the file."""
    start: int
    """Address of the first byte."""
    size: int
    """Bytes."""


def clean_mappings(*files: Path) -> list[Mapping]:
    """This process's clean mappings of some files (not written to); [] except on Linux."""
    return [mapping for mapping, is_clean in _mappings("smaps", *files) if is_clean]


@contextmanager
def mapped_within(file: Path, lasting: Path) -> Iterator[list[Mapping]]:
    """A context manager that collects the mappings of a file that its block creates.

    The list is filled when the block ends without an error. Blocks run one at a time, and mappings
    that existed before are left out: their owners may unmap them at any time, and other memory may
    then take their addresses.

    Args:
        file: the file that the block maps.
        lasting: a file that stays mapped until the process ends; all its clean mappings are
            included too.
    """
    found: list[Mapping] = []
    with _one_at_a_time:
        others = {mapping for mapping, _ in _mappings("maps", file)}
        yield found
        found += [mapping for mapping in clean_mappings(file, lasting) if mapping not in others]


def forget_pages(mappings: Iterable[Mapping]) -> None:
    """Release the resident pages of memory-mapped files (Linux only).

    Nothing is lost: a page that is read again is mapped again, from the page cache if possible.

    Args:
        mappings: clean mappings. The caller ensures that they stay mapped during the call: other
            memory at their addresses would be zeroed.
    """
    advise = c_function("madvise")
    if advise is None:
        return
    for mapping in mappings:
        advise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size), _MADV_DONTNEED)


def forget_bytes(block: NDArray[np.uint8], start: int) -> bool:
    """Release the whole pages of an array from byte `start` on; they become zeros (Linux only).

    Returns:
        False if the pages could not be released; True also if there were none.
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
    """This process's mappings of some files, and whether each is known to be clean.

    Args:
        name: "smaps", which takes 30 ms at the 1.3B shape, as it visits every page; or "maps",
            which is fast but reports no mapping as clean.
        files: the files.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        text = Path("/proc/self", name).read_text("utf-8", "surrogateescape")
    except OSError:  # not available in some sandboxes
        return
    # QEMU's user-mode emulation, used to build containers for other processors, writes a file of
    # its own in which all counts are zero.
    is_true = _IN_MEMORY.search(text) is not None
    wanted = {str(path): path for path in (file.resolve() for file in files)}
    mapping, is_clean = None, False
    for line in text.splitlines():
        if match := _MAPPING.fullmatch(line):
            if mapping is not None:
                yield mapping, is_clean
            mapping, is_clean = None, False
            if (path := wanted.get(match[4])) is not None:  # skips a thousand others cheaply
                start, stop, offset = (int(match[group], 16) for group in (1, 2, 3))
                mapping = Mapping(path, offset, start, stop - start)
        elif line.startswith("Anonymous:"):
            is_clean = is_true and line.split()[1] == "0"
    if mapping is not None:
        yield mapping, is_clean
