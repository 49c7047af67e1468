"""Memory that is not needed any more goes back to the system, not only to the C library.

glibc keeps what was freed for later allocations: about 40 MB of it after the sessions of the 1.3B
shape were built, and as much again after a prompt. And pages of mapped files that only loading
read stay with the process. Servers that run several processes want both back.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["forget_pages", "give_back"]

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ [0-9a-f]+ \S+ \S+ +(.*)")
_MADV_DONTNEED = 4


def give_back() -> None:
    """Return freed heap to the system, where the C library can (glibc); a few milliseconds."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def forget_pages(*files: Path) -> None:
    """Take the pages of mapped files out of this process, where the system can (Linux).

    Nothing is lost: a page that is read again is mapped again, from the system's file cache if it
    still is there. Mappings that have been written to are left alone.

    Args:
        files: those that this process has not mapped are passed over.
    """
    advise = _c_function("madvise")
    if advise is None:
        return
    wanted = {str(path.resolve()) for path in files}
    for path, start, size in _clean_mappings():
        if path in wanted:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)


def _clean_mappings() -> Iterator[tuple[str, int, int]]:
    """File, address and bytes of each mapping that holds nothing but its file."""
    path, start, size = "", 0, 0
    for line in Path("/proc/self/smaps").read_text("utf-8", "surrogateescape").splitlines():
        if match := _MAPPING.fullmatch(line):
            start, stop = (int(match[group], 16) for group in (1, 2))
            path, size = match[3], stop - start
        elif line.startswith("Anonymous:") and line.split()[1] == "0":
            yield path, start, size


@functools.cache
def _c_function(name: str) -> Any:
    """A function of the C library; None where there is none, or no Linux."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
