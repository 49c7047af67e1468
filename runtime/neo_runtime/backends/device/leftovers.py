"""Device memory of caches that are closed, or garbage, until it can be given back."""

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
"""Of devices that are garbage, while another model's capture holds their locks."""
_live: weakref.WeakSet[Leftovers] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: what is on a device is not the child's to give back.

    The end of a session would wait for threads that are not there.
    """
    for leftovers in {*_live, *_orphans}:
        leftovers.is_abandoned = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(leftovers))  # with all that it knows
    _live.clear()
    _orphans.clear()


in_every_child(_leave_to_the_parent)


class Leftovers:
    """Work that waits until nobody uses the device.

    Garbage is collected at any moment, in the middle of this thread's own use of the device too,
    when nothing may be freed (kernels are being captured) and lists are half changed. So a
    finalizer leaves its work here. It is done at once if the device is nobody's, else before
    memory is next asked for.

    Args:
        lock: held by whoever uses the device; not reentrant.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: deque[Callable[[], None]] = deque()
        self._last: Callable[[], None] | None = None
        self.is_abandoned = False
        """In a child of the process that the device was opened in, where nothing is done."""
        _live.add(self)

    def leave(self, work: Callable[[], None]) -> None:
        """Do `work` now or later; never waits."""
        self._waiting.append(work)
        self.settle()

    def at_end_of(self, owner: Any, work: Callable[[], None]) -> weakref.finalize[[], Any]:
        """Leave `work`, which holds all of a device, once `owner` is garbage.

        Nobody uses the device then: what waits is done for any other. Not where the process ends:
        the system takes everything then.
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
        """Do what waits, if nobody uses the device; for who has just let go of the lock, too."""
        self._settle()
        for _ in range(len(_orphans)):
            try:
                orphan = _orphans.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                orphan._settle()
            except Exception as error:  # nobody who is here has to do with it
                _LOG.warning("a model that was dropped could not give back all: %s", error)
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
        """The device for oneself, once what waits is done: for who asks for memory."""
        with self._lock:
            self.clear()
            yield

    def clear(self) -> None:
        """Do what waits. The caller holds the lock."""
        while self._waiting:
            self._waiting.popleft()()
