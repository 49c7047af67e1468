"""The KV cache, as users of the library see it."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.closable import Closable, of_open_cache
from neo_runtime.errors import NeoError, RequestError
from neo_runtime.options.values import count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.base import Backend, CacheStore
    from neo_runtime.cache.ledger import CacheLedger

__all__ = ["KVCache", "row_numbers"]


class KVCache(Closable):
    """Keys and values of `batch` sequences of up to `length` positions.

    Made by `Model.new_cache`; only one thread may use it at a time. The memory is allocated once,
    and freed by `close`, at the end of a `with` block, or when the object is garbage-collected. On
    a CPU the model keeps the memory of the last closed cache for the next one, until `Model.close`.
    """

    def __init__(self, backend: Backend, ledger: CacheLedger, batch: int, length: int) -> None:
        """Allocate the memory.

        Raises:
            CacheLimitError: the ledger's limit would be exceeded, or the system has no memory.
        """
        self._backend = backend
        self._max_batch = batch
        self._is_changing = self._is_closing = False
        self._call = threading.Lock()
        """Held by a call that uses the cache, until it returns."""
        self._length = length
        self._nbytes = backend.cache_bytes(batch, length)
        what = f"a cache of {batch} x {length} positions"
        self._open_store: CacheStore | None
        self._open_store, release = ledger.allocate(
            self._nbytes, what, partial(backend.open_cache, batch, length)
        )
        self._release = weakref.finalize(self, release)
        self._release.atexit = False

    def renew_lock(self) -> None:
        """Replace the lock, in a forked child: a thread that holds the old one is not there."""
        self._call = threading.Lock()

    def is_of(self, backend: Backend) -> bool:
        """Whether the cache was allocated by this backend."""
        return self._backend is backend

    @contextmanager
    def changing(self) -> Iterator[CacheStore]:
        """A context manager for each call that changes the contents.

        Graphs write into the cache while they run, so a call that ended early (Ctrl-C, no memory)
        leaves undefined contents: local layers may have evicted positions, and lengths do not
        agree.

        Raises:
            NeoError: the cache is closed, another call uses it, or an earlier call ended early.
        """
        with self.reading() as store:
            self._is_changing = True
            yield store
            self._is_changing = False

    @contextmanager
    def reading(self) -> Iterator[CacheStore]:
        """A context manager for each call that reads the contents.

        Raises:
            NeoError: as for `changing`.
        """
        store = self.store
        if not self._call.acquire(blocking=False):
            raise NeoError(
                "the cache is in use by another call right now; a cache belongs to one thread at a "
                "time: make one for each with Model.new_cache"
            )
        try:
            if self._is_changing:
                raise NeoError(
                    "the last call with this cache failed or was interrupted, so its contents are "
                    "not known; make another one with Model.new_cache"
                )
            yield store
        finally:
            self._call.release()
            if self._is_closing:  # by another thread, meanwhile
                self.close()

    @property
    def store(self) -> CacheStore:
        """The backend's part of the cache.

        Raises:
            NeoError: the cache is closed.
        """
        return of_open_cache(None if self._is_closing else self._open_store)

    @property
    def batch(self) -> int:
        """Sequences in use; `reorder` and `extend` change it."""
        return self.store.batch

    @property
    def length(self) -> int:
        """Positions that each sequence may have."""
        return self._length

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions that each sequence has now: int64 [batch], a copy."""
        return self.store.lengths.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that were allocated."""
        return self._nbytes

    def reorder(self, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Replace sequence `i` by the former sequence `rows[i]`; only positions in use are copied.

        Rows may be left out (finished sequences), permuted or repeated (beams). The new batch is
        `len(rows)`, at most the batch that the cache was made for. `rows` may be empty; `extend`
        then adds sequences.

        Raises:
            RequestError: a row does not exist, or there are too many rows.
        """
        chosen = row_numbers("reorder", rows, self.batch)
        if len(chosen) > self._max_batch:
            raise RequestError(
                f"reorder got {len(chosen)} rows, expected at most {self._max_batch}: the batch "
                "that the cache was made for"
            )
        with self.changing() as store:
            store.reorder(chosen)

    def crop(self, length: int) -> None:
        """Keep at most the first `length` positions of each sequence.

        Args:
            length: 0 or more; shorter sequences stay as they are.

        Raises:
            RequestError: `length` is not an integer of at least 0, or local layers have evicted
                positions that they would need again (see `room_to_crop`).
        """
        most = min(count(0)("length", length), self._length)
        with self.reading() as store:
            lengths = np.minimum(store.lengths, most)
            is_lost = store.evicted(store.lengths) != store.evicted(lengths)
        if is_lost.any():
            row = int(is_lost.argmax())
            raise RequestError(
                f"crop got {length}, but what sequence {row} of {store.lengths[row]} positions had "
                "in its local layers then is no longer there; crop by fewer positions (see "
                "room_to_crop), or begin again with Model.prefill"
            )
        if (lengths < store.lengths).any():
            with self.changing():
                store.crop(lengths)

    @property
    def room_to_crop(self) -> int:
        """Positions that may be appended to every sequence such that `crop` can remove them again.

        In a bundle for the CPU, the buffers of local layers hold one and a quarter windows. When a
        buffer is full, its last window moves to the front; `crop` cannot go back past such a move.
        """
        with self.reading() as store:
            slots = self._length if store.local_slots is None else store.local_slots
            held = store.lengths - store.evicted(store.lengths)
            return int((slots - held).min(initial=slots))

    def extend(self, sequences: int) -> None:
        """Add empty sequences after those in use, for requests that join a running batch.

        `Model.prefill` with `rows` appends their first tokens.

        Raises:
            RequestError: `sequences` is below 1, or exceeds the batch that the cache was made for.
        """
        count(1)("sequences", sequences)
        if self.batch + sequences > self._max_batch:
            raise RequestError(
                f"extend got {sequences} sequences, expected at most "
                f"{self._max_batch - self.batch}: {self.batch} of the {self._max_batch} that the "
                "cache was made for are in use"
            )
        with self.changing() as store:
            store.extend(sequences)

    def copy_from(self, source: KVCache, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Copy the first sequence of another cache to empty sequences of this one.

        Args:
            source: a cache of the same model, whose first sequence fits into this one.
            rows: indices of the empty sequences.

        Raises:
            RequestError: a row does not exist or is not empty, or the source does not fit.
        """
        chosen = row_numbers("copy_from", rows, self.batch)
        if source is self or not source.is_of(self._backend) or not source.batch:
            raise RequestError("copy_from expects another cache of this model, with a sequence")
        used = int(source.store.lengths[0])
        if used > self._length:
            raise RequestError(
                f"copy_from got a sequence of {used} positions, expected at most {self._length}, "
                "as this cache has; make it longer"
            )
        if self.store.lengths[chosen].any() or len(set(chosen.tolist())) < len(chosen):
            raise RequestError(
                f"copy_from got rows {chosen.tolist()}, expected empty ones, each once; add some "
                "with extend"
            )
        with source.reading() as read, self.changing() as store:
            store.fill(chosen, read)

    @property
    def closed(self) -> bool:
        """Whether the memory was freed."""
        return self._open_store is None or self._is_closing

    def close(self) -> None:
        """Free the memory, after a call still running in another thread; closing again is safe."""
        self._is_closing = True
        if not self._call.acquire(blocking=False):
            return  # that call closes the cache at its end
        try:
            if self._open_store is not None:
                self._open_store.close()
                self._open_store = None
                self._release()
        finally:
            self._call.release()


def row_numbers(
    call: str, rows: Sequence[int] | NDArray[np.int64], batch: int
) -> NDArray[np.int64]:
    """Validated row indices, int64 [n], each from 0 to `batch` - 1.

    Args:
        call: name of the method that got them, for messages.
        rows: the given indices.
        batch: number of rows.

    Raises:
        RequestError: `rows` is not a flat sequence of integers, or a row does not exist.
    """
    try:
        found = np.asarray(rows)
    except ValueError as error:  # of unequal lengths
        raise RequestError(f"{call} got {rows!r}, expected a flat sequence of rows") from error
    if found.dtype == np.bool_:
        raise RequestError(
            f"{call} got booleans, expected row numbers; give np.flatnonzero of them"
        )
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise RequestError(
            f"{call} got {found.dtype} of shape {list(found.shape)}, expected a flat sequence of "
            "row numbers"
        )
    chosen = found.astype(np.int64, copy=False)
    if chosen.min(initial=0) < 0 or chosen.max(initial=-1) >= batch:
        expected = f"0 to {batch - 1}" if batch else "none, as the cache has no rows"
        raise RequestError(f"{call} got rows {chosen.tolist()}, expected {expected}")
    return chosen
