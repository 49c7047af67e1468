"""Memory that the C library keeps of what was freed: most goes back to the system, some is of use.

glibc holds about 40 MB after the sessions of the 1.3B shape were built, and as much again after a
long prompt. Servers that run several processes want that back; but a page that the system hands out
anew costs more than a microsecond, 2 % of a prompt's time, so a little may stay.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.backends.cpu.c_library import c_function

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Heap", "give_back", "hold_within_calls"]

_STATM = Path("/proc/self/statm")
_LARGEST_BLOCK = (32 << 20) - (8 << 10)  # glibc's DEFAULT_MMAP_THRESHOLD_MAX, its header included


class Heap:
    """Gives back what calls freed, once enough has come together. Safe for threads.

    What counts is by how much the process has grown since the least that it had in use, seen where
    calls begin. What callers free themselves is noticed where it leaves the process.
    """

    def __init__(self, spare: int) -> None:
        """Take notice of how much memory is in use.

        Args:
            spare: bytes that may stay, of what calls freed.
        """
        self._spare = spare
        self._lock = threading.Lock()
        self._running = 0
        self._low = anonymous_bytes()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around what takes memory and frees it."""
        used = anonymous_bytes()
        with self._lock:
            self._running += 1
            if used is not None and self._low is not None:
                self._low = min(self._low, used)
        try:
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        with self._lock:  # first: reading a file may be interrupted (Ctrl-C)
            self._running -= 1
            low, alone = self._low, self._running == 0
        used = anonymous_bytes()
        if used is not None and low is not None and used - low <= self._spare:
            return
        give_back()
        if alone:  # else the activations of another call would count as what must be there
            used = anonymous_bytes()
            with self._lock:
                self._low = used


def give_back() -> None:
    """Return freed heap to the system, where the C library can (glibc); a few milliseconds."""
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


def hold_within_calls() -> None:
    """Have the C library keep what operators free while a call runs (glibc).

    glibc maps blocks above a threshold one by one, and shrinks its heap when twice as much is free
    at its end: activations of long prompts come and go that way, 32,000 of 47,000 new pages for
    1024 tokens of the 1.3B shape. It raises both limits to what it has seen freed (mallopt(3),
    M_MMAP_THRESHOLD), so it is shown the largest block that counts; nothing is written to it.
    """
    malloc, free = c_function("malloc"), c_function("free")
    if malloc is None or free is None:
        return
    malloc.restype = ctypes.c_void_p
    free(ctypes.c_void_p(malloc(ctypes.c_size_t(_LARGEST_BLOCK))))


def anonymous_bytes() -> int | None:
    """Memory of this process that belongs to no file; None where the system does not say."""
    try:
        _, resident, of_files, *_ = _STATM.read_text("ascii").split()
    except OSError:
        return None
    return mmap.PAGESIZE * (int(resident) - int(of_files))
