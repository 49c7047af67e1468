"""The beginning that many prompts share, computed once: `Model.prefix`."""

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
    """Keys and values of a text that prompts go on from. Threads may share it.

    Made by `Model.prefix`, and given as `prefix=` to `generate`, `stream` and `Scheduler.submit`.
    Its memory counts towards `max_cache_bytes` until `close`, or until it is garbage.
    """

    def __init__(self, model: CachedModel, ids: NDArray[np.int64]) -> None:
        """Compute the text.

        Args:
            model: whose cache it is.
            ids: int64 [n], the prefix's own.
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
        """In a forked child, where the threads that may hold the old one are not there."""
        self._lock = threading.RLock()  # signal handlers may call
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
        """Refuse what cannot be used.

        Raises:
            NeoError: it is closed.
            RequestError: it is another model's.
        """
        self._check_open()
        if not model.owns(self._cache):
            raise RequestError("the prefix is another model's; make one with this one's prefix")

    def hold(self) -> None:
        """Keep the memory beyond `close`, until `release`.

        Raises:
            NeoError: it is closed.
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
        """Let empty sequences of a cache begin with it."""
        with self._lock:
            cache.copy_from(self._cache, rows)

    def close(self) -> None:
        """Free the memory, once requests that were submitted before have read it."""
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
    """A block in which a prefix, if there is one, keeps its memory.

    Raises:
        NeoError: it is closed.
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
    """Tokens of a prefix, if there is one."""
    return 0 if prefix is None else len(prefix.ids)


def behind(prefix: Prefix | None, prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of a prompt, int64 [n], without those of its prefix."""
    return prompt[length_of(prefix) :]
