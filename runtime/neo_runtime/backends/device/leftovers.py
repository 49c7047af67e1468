"""Device memory of caches that are closed, or garbage, until it can be given back."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

__all__ = ["Leftovers"]


_LOG = logging.getLogger("neo_runtime")
_orphans: deque[Leftovers] = deque()
"""Of devices that are garbage, while another model's capture holds their locks."""


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

    def leave(self, work: Callable[[], None]) -> None:
        """Do `work` now or later; never waits."""
        self._waiting.append(work)
        self.settle()

    def leave_last(self, work: Callable[[], None]) -> None:
        """As `leave`, on a device that nobody will use again: what waits is done for any other."""
        self.leave(work)
        if self._waiting:
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
        while self._waiting and self._lock.acquire(blocking=False):
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
