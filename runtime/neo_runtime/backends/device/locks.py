"""Locks for devices: a backend's calls hold its own lock, and a capture holds all of them.

onnxruntime captures CUDA graphs in CUDA's global mode. In that mode a call that cannot be captured
(such as `cudaMalloc` or `cudaFree`) fails and invalidates the capture, whichever thread makes it,
and even for another model (CUDA Runtime API, `cudaStreamBeginCapture`).
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["alone", "between_captures", "new_lock"]

_capturing = threading.Lock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_waiting: set[Any] = set()
"""Locks whose holders wait for another capture to end."""
_PATIENCE = 0.001
"""Seconds between checks whether the holder of a lock has begun to wait."""


def _forget() -> None:
    """In a forked child: the threads that held the locks do not exist, and it has no devices."""
    global _capturing
    _capturing = threading.Lock()
    _locks.clear()
    _waiting.clear()


in_every_child(_forget)


def new_lock() -> threading.Lock:
    """A lock for the calls of one device's stream."""
    lock = threading.Lock()
    with _capturing:
        _locks.add(lock)
    return lock


@contextmanager
def between_captures() -> Iterator[None]:
    """Prevent captures during the block; for using a device that has no lock yet."""
    with new_lock():
        yield


@contextmanager
def alone(lock: threading.Lock) -> Iterator[None]:
    """Hold the locks of all devices during the block. The caller holds `lock`, and keeps it.

    Two concurrent callers do not deadlock: a thread that waits here does not use its device, so
    the other one proceeds without that thread's lock.
    """
    _waiting.add(lock)
    try:
        with _capturing, ExitStack() as held:
            _waiting.discard(lock)
            for other in list(_locks):
                if other is not lock:
                    _hold(other, held)
            yield
    finally:
        _waiting.discard(lock)


def _hold(lock: Any, held: ExitStack) -> None:
    while not lock.acquire(timeout=_PATIENCE):
        if lock in _waiting:
            return
    held.callback(lock.release)
