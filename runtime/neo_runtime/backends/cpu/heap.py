"""Return freed heap from the C library to the system, except for a small reserve.

After building the sessions of the 1.3B shape glibc retains about 40 MB of freed memory, and as much
again after a long prompt. Servers that run several processes need it back. But every page taken
anew from the system costs more than a microsecond, in all 2 % of a prompt's time, so a little is
kept.
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
    """Returns freed heap to the system once more than a reserve has accumulated. Thread-safe.

    The measure is how far the process's anonymous memory has grown above the lowest value seen at
    the beginning of a call.
    """

    def __init__(self, spare: int) -> None:
        """Record the current memory use.

        Args:
            spare: bytes of freed heap that may be kept.
        """
        self._spare = spare
        self._lock = threading.Lock()
        self._running = 0
        self._low = anonymous_bytes()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A context manager for work that allocates and frees a lot of memory."""
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
        with self._lock:  # before reading the file, which Ctrl-C may interrupt
            self._running -= 1
            low, alone = self._low, self._running == 0
        used = anonymous_bytes()
        if used is not None and low is not None and used - low <= self._spare:
            return
        give_back()
        if alone:  # else the activations of another call would raise the low mark
            used = anonymous_bytes()
            with self._lock:
                self._low = used


def give_back() -> None:
    """Return freed heap to the system (glibc only); takes a few milliseconds."""
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


def hold_within_calls() -> None:
    """Make glibc retain memory that operators free during a call.

    glibc maps blocks above a threshold individually, and trims its heap when twice that much is
    free at the end. So the activations of long prompts are returned and taken anew: 32,000 of
    47,000 new pages for 1024 tokens at the 1.3B shape. glibc raises both limits when a mapped block
    is freed (mallopt(3), M_MMAP_THRESHOLD). This allocates and frees the largest block that raises
    them; nothing is written to it.
    """
    malloc, free = c_function("malloc"), c_function("free")
    if malloc is None or free is None:
        return
    malloc.restype = ctypes.c_void_p
    free(ctypes.c_void_p(malloc(ctypes.c_size_t(_LARGEST_BLOCK))))


def anonymous_bytes() -> int | None:
    """Resident bytes of this process that no file backs; None where /proc is not available."""
    try:
        _, resident, of_files, *_ = _STATM.read_text("ascii").split()
    except OSError:
        return None
    return mmap.PAGESIZE * (int(resident) - int(of_files))
