"""A beginning that many prompts share, computed once: `Model.prefix`."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neo_runtime.closable import Closable, closed_on_error
from neo_runtime.errors import NeoError, RequestError
from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel

__all__ = ["Prefix", "behind", "held", "length_of"]


_all: weakref.WeakSet[Prefix] = weakref.WeakSet()


def _renew_locks() -> None:
    for prefix in list(_all):
        prefix.renew_locks()


in_every_child(_renew_locks)


class Prefix(Closable):
    """Keys and values of the beginning of prompts. Several threads may use one at once.

    Made by `Model.prefix`, and given as `prefix=` to `generate`, `stream` and `Scheduler.submit`.
    Its memory counts towards `max_cache_bytes` until `close`, or until it is garbage-collected.
    """

    def __init__(self, model: CachedModel, ids: NDArray[np.int64]) -> None:
        """Compute the keys and values.

        Args:
            model: allocates the cache and computes.
            ids: int64 [n], an array that belongs to the prefix.
        """
        ids.flags.writeable = False
        self._ids = ids
        self._users = 0
        self._is_closed = False
        self._cache = model.new_cache(1, model.rounded_length(len(ids)))
        with closed_on_error(self._cache):
            model.prefill_step(self._cache, [ids])
        self.renew_locks()
        _all.add(self)

    def renew_locks(self) -> None:
        """Make new locks, in a forked child too: threads that hold the old ones are not there."""
        self._lock = threading.RLock()  # reentrant: a signal handler may call the prefix
        self._cache.renew_lock()

    @property
    def ids(self) -> NDArray[np.int64]:
        """Its tokens, int64 [n], read-only."""
        return self._ids

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._cache.nbytes

    def check(self, model: CachedModel) -> None:
        """Check that the prefix can be used with a model.

        Raises:
            NeoError: the prefix is closed.
            RequestError: the prefix belongs to another model.
        """
        self._check_open()
        if not model.owns(self._cache):
            raise RequestError("the prefix is another model's; make one with this one's prefix")

    def hold(self) -> None:
        """Keep the memory until `release`, even if `close` is called before.

        Raises:
            NeoError: the prefix is closed.
        """
        with self._lock:
            self._check_open()
            self._users += 1

    def release(self) -> None:
        """Undo `hold`."""
        with self._lock:
            self._users -= 1
            self._free()

    def fill(self, cache: KVCache, rows: Sequence[int]) -> None:
        """Copy its keys and values to empty rows of a cache."""
        with self._lock:
            cache.copy_from(self._cache, rows)

    def close(self) -> None:
        """Free the memory as soon as the requests already submitted have copied it."""
        with self._lock:
            self._is_closed = True
            self._free()

    def _check_open(self) -> None:
        if self._is_closed:
            raise NeoError("the prefix is closed; make another one with Model.prefix")

    def _free(self) -> None:
        if self._is_closed and not self._users:
            self._cache.close()


@contextmanager
def held(prefix: Prefix | None) -> Iterator[None]:
    """A context manager that keeps the memory of a prefix, if there is one.

    Raises:
        NeoError: the prefix is closed.
    """
    if prefix is None:
        yield
        return
    prefix.hold()
    try:
        yield
    finally:
        prefix.release()


def length_of(prefix: Prefix | None) -> int:
    """Number of tokens of a prefix; 0 for None."""
    return 0 if prefix is None else len(prefix.ids)


def behind(prefix: Prefix | None, prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of a prompt after its prefix: int64 [n]."""
    return prompt[length_of(prefix) :]
