"""Deferred release of device memory that belonged to closed or garbage-collected caches."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

__all__ = ["Leftovers"]


_LOG = logging.getLogger("neo_runtime")
_orphans: deque[Leftovers] = deque()
"""Leftovers of dropped backends whose locks were held by another model's capture."""
_live: weakref.WeakSet[Leftovers] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child, never release anything: device memory belongs to the parent.

    Destroying a session would also wait for its threads, which a fork does not copy.
    """
    for leftovers in {*_live, *_orphans}:
        leftovers.is_abandoned = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(leftovers))  # leaks all that it refers to
    _live.clear()
    _orphans.clear()


in_every_child(_leave_to_the_parent)


class Leftovers:
    """A queue of work, such as freeing memory, that must wait until the device is not in use.

    The garbage collector may run a finalizer at any point, even while its own thread uses the
    device: during a capture, when nothing may be freed, or while a pool is being changed. So
    finalizers queue their work here. It is done at once if the device's lock is free, else before
    the next allocation of a cache or pool.

    Args:
        lock: held by whoever uses the device; not reentrant.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: deque[Callable[[], None]] = deque()
        self._last: Callable[[], None] | None = None
        self.is_abandoned = False
        """Whether this is a forked child of the process that opened the device."""
        _live.add(self)

    def leave(self, work: Callable[[], None]) -> None:
        """Do `work` now or later, without blocking."""
        self._waiting.append(work)
        self.settle()

    def at_end_of(self, owner: Any, work: Callable[[], None]) -> weakref.finalize[[], Any]:
        """Queue `work`, which releases a whole device, once `owner` is garbage-collected.

        If the lock is held then, later calls for other devices do the work. It is not done when the
        process ends, because the system frees everything.

        Returns:
            The finalizer; `detach` it to cancel.
        """
        self._last = work
        end = weakref.finalize(owner, self._leave_last)
        end.atexit = False
        return end

    def _leave_last(self) -> None:
        assert self._last is not None
        self.leave(self._last)
        if self._waiting and not self.is_abandoned:
            _orphans.append(self)

    def settle(self) -> None:
        """Do the queued work if the lock is free, also that of dropped backends.

        Call it after releasing the lock: work may have been queued meanwhile.
        """
        self._settle()
        for _ in range(len(_orphans)):
            try:
                orphan = _orphans.popleft()
            except IndexError:  # another thread took it
                return
            try:
                orphan._settle()
            except Exception as error:  # unrelated to the current caller
                _LOG.warning("a dropped model could not free all of its GPU memory: %s", error)
            if orphan._waiting:
                _orphans.append(orphan)

    def _settle(self) -> None:
        while self._waiting and not self.is_abandoned and self._lock.acquire(blocking=False):
            try:
                self.clear()
            finally:
                self._lock.release()

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """A context manager that holds the lock, after doing the queued work; for allocations."""
        with self._lock:
            self.clear()
            yield

    def clear(self) -> None:
        """Do the queued work. The caller holds the lock."""
        while self._waiting:
            self._waiting.popleft()()
