"""Locks of devices: each is held by one backend's calls, and all of them while one captures.

onnxruntime captures CUDA graphs in CUDA's global mode, in which a call of any thread that may not
be captured (`cudaMalloc`, `cudaFree`) fails and spoils the capture, be it another model's
(CUDA Runtime API, `cudaStreamBeginCapture`).
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["alone", "new_lock"]

_capturing = threading.Lock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def new_lock() -> threading.Lock:
    """A lock for the calls of one device's stream."""
    lock = threading.Lock()
    with _capturing:
        _locks.add(lock)
    return lock


@contextmanager
def alone(lock: threading.Lock) -> Iterator[None]:
    """Hold the locks of all devices.

    The caller holds `lock`. It is let go of for a moment, or two callers would wait for each
    other's; what it protects may have changed when the block begins and when it has ended.
    """
    lock.release()
    try:
        with _capturing, ExitStack() as held:
            for one in list(_locks):
                held.enter_context(one)
            yield
    finally:
        lock.acquire()
