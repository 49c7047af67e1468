"""The account of the memory of all caches of a model."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from neo_runtime.errors import CacheLimitError, NeoError
from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CacheLedger"]

Memory = TypeVar("Memory")

_ASK = "ask for fewer or shorter sequences at once"

_ledgers: weakref.WeakSet[CacheLedger] = weakref.WeakSet()


def _renew_ledgers() -> None:
    for ledger in list(_ledgers):
        ledger.renew_lock()


in_every_child(_renew_ledgers)


class CacheLedger:
    """Counts the bytes of all open caches of a model against a limit.

    Threads and finalizers may call it at any time.
    """

    def __init__(self, limit: int | None) -> None:
        _ledgers.add(self)
        self._limit = limit
        self._lock = threading.Lock()
        self._taken = 0
        self._returned: deque[int] = deque()
        """Sizes released since `_taken` was last updated."""

    def renew_lock(self) -> None:
        """Replace the lock, in a forked child: a thread that holds the old one is not there."""
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        """Bytes of the caches that are open now."""
        with self._lock:
            return self._settled()

    @property
    def left(self) -> int | None:
        """Bytes that caches may still take; None without a limit."""
        return None if self._limit is None else max(0, self._limit - self.in_use)

    def reserve(self, size: int, what: str, ask: str = _ASK) -> None:
        """Reserve `size` bytes.

        Args:
            size: bytes.
            what: what needs them, for the message.
            ask: the message's advice on how to need less.

        Raises:
            CacheLimitError: the limit would be exceeded; nothing is reserved.
        """
        with self._lock:
            in_use = self._settled()
            if self._limit is None or in_use + size <= self._limit:
                self._taken += size
                return
        raise CacheLimitError(
            f"{what} needs {size} bytes; {in_use} of the limit of {self._limit} bytes are in use "
            f"(max_cache_bytes); {ask}, close other requests, or raise the limit"
        )

    def allocate(
        self, size: int, what: str, make: Callable[[], Memory], ask: str = _ASK
    ) -> tuple[Memory, Callable[[], object]]:
        """Reserve `size` bytes and call `make`, which allocates them.

        Returns:
            The result of `make`, and a function that releases the reservation.

        Raises:
            CacheLimitError: the limit would be exceeded, or the system has too little memory.
        """
        too_much = f"{what} needs {size} bytes, more than the system has; {ask}"
        if size > sys.maxsize:
            raise CacheLimitError(too_much)
        self.reserve(size, what, ask)
        try:
            return make(), partial(self.release, size)
        except BaseException as error:
            self.release(size)
            if isinstance(error, MemoryError) and not isinstance(error, NeoError):
                raise CacheLimitError(too_much) from error
            raise

    def release(self, size: int) -> None:
        """Release `size` bytes.

        Takes no lock: the finalizer of a cache may run at any moment, also in a thread that holds
        the lock.
        """
        self._returned.append(size)

    def _settled(self) -> int:
        while self._returned:
            self._taken -= self._returned.popleft()
        return self._taken
