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

from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["alone", "between_captures", "new_lock"]

_capturing = threading.Lock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_waiting: set[Any] = set()
"""Locks whose holders wait for another's capture to end."""
_PATIENCE = 0.001
"""Seconds between looks at whether a holder has begun to wait."""


def _forget() -> None:
    """In a forked child: who held them is not there, and no device is the child's."""
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
    """While nobody captures: for who uses a device without a lock of its own yet."""
    with new_lock():
        yield


@contextmanager
def alone(lock: threading.Lock) -> Iterator[None]:
    """Hold the locks of all devices; the caller holds `lock`, and keeps it.

    Of two callers that hold their locks and want the other's, one goes first: who waits here uses
    no device, so its lock is as good as held.
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
