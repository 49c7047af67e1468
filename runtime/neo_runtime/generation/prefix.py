"""The beginning that many prompts share, computed once: `Model.prefix`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from neo_runtime.closable import Closable
from neo_runtime.errors import NeoError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel

__all__ = ["Prefix", "behind"]


class Prefix(Closable):
    """Keys and values of a text that prompts go on from. Threads may share it.

    Made by `Model.prefix`, and given as `prefix=` to `generate`, `stream` and `Scheduler.submit`.
    Its memory counts towards `max_cache_bytes` until `close`, or until it is garbage.
    """

    def __init__(self, model: CachedModel, ids: NDArray[np.int64]) -> None:
        """Compute the text.

        Args:
            model: whose cache it is.
            ids: int64 [n].
        """
        self._ids = ids
        self._one_at_a_time = threading.Lock()
        self._cache = model.new_cache(1, model.rounded_length(len(ids)))
        try:
            model.prefill_step(self._cache, [ids])
        except BaseException:
            self._cache.close()
            raise

    @property
    def ids(self) -> NDArray[np.int64]:
        """Its tokens, int64 [n]."""
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

    def fill(self, cache: KVCache, row: int) -> None:
        """Let an empty sequence of a cache begin with it.

        Raises:
            NeoError: it is closed; the cache is as before.
        """
        with self._one_at_a_time:
            self._check_open()
            cache.copy_from(self._cache, [row])

    def _check_open(self) -> None:
        if self._cache.closed:
            raise NeoError("the prefix is closed; make another one with Model.prefix")

    def close(self) -> None:
        """Free the memory; requests whose prompts are computed go on."""
        with self._one_at_a_time:
            self._cache.close()


def behind(prefix: Prefix | None, prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of a prompt, int64 [n], without those of its prefix."""
    return prompt if prefix is None else prompt[len(prefix.ids) :]
