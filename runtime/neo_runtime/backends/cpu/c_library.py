"""Functions of the C library that Python does not wrap."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

__all__ = ["c_function"]


@functools.cache
def c_function(name: str) -> Any:
    """A function of the C library by name; None if it has none, and on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
