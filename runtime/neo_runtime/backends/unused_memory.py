"""Freed memory goes back to the system, not only to the C library.

glibc keeps what was freed for later allocations: about 40 MB of it after the sessions of the 1.3B
shape were built, and as much again after a prompt. Servers that run several processes want it back.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

__all__ = ["give_back"]


def give_back() -> None:
    """Return freed heap to the system, where the C library can (glibc); a few milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """The function of malloc_trim(3); None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
