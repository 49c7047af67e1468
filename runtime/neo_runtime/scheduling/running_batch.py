"""A batch that requests join and leave while it runs: continuous batching, in one thread.

    inbox ──▶ waiting ──prefill──▶ active: row i of the cache ──decode, a token a step──▶ ended

Between two decode steps rows that have ended leave the cache, and requests that wait take their
places, as many as have room; of their prompts at most a chunk goes through the graph, or one
prompt, so that those who are being answered do not wait long.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from neo_runtime.generation.generator import fill_holes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.scheduling.pending import PendingCompletion

__all__ = ["RunningBatch"]


class RunningBatch:
    """See the module. `put`, `end` and `cancel` may be called by any thread and any finalizer."""

    def __init__(self, model: CachedModel, batch: int, length: int) -> None:
        """Allocate the cache and start the thread.

        Args:
            model: computes the logits.
            batch: sequences at once, at most.
            length: positions of each, at most.

        Raises:
            CacheLimitError: there is no room for the cache.
        """
        self._model, self._batch, self._length = model, batch, length
        self._inbox: SimpleQueue[PendingCompletion | None] = SimpleQueue()
        self._waiting: deque[PendingCompletion] = deque()
        self._active: list[PendingCompletion] = []
        """By row of the cache."""
        self._is_ending = self._is_cancelled = False
        self._cache: KVCache | None = self._new_cache()
        # A daemon: whoever forgets to close it can still end the process.
        self._thread = threading.Thread(target=self._run, name="neo-scheduler", daemon=True)
        self._thread.start()

    def put(self, pending: PendingCompletion) -> None:
        """Take a request, not after `end` or `cancel`."""
        self._inbox.put(pending)

    def end(self) -> None:
        """Stop once what was put is done."""
        self._inbox.put(None)

    def cancel(self) -> None:
        """Stop before the next token: what has not ended ends as "cancelled"."""
        self._is_cancelled = True
        self.end()

    def join(self) -> None:
        """Wait until it has stopped. In its own thread, as from a callback, there is no waiting."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting) + self._inbox.qsize()

    @property
    def active(self) -> int:
        """Requests that are being computed."""
        return sum(not pending.has_ended for pending in self._active)

    def _run(self) -> None:
        while self._receive():
            try:
                self._advance()
            except BaseException as error:
                self._fail(error)
        self._close_cache()

    def _fail(self, error: BaseException) -> None:
        """End what is active: what the cache holds is not known any more."""
        for pending in self._active:
            pending.fail(error)
        self._active = []
        self._close_cache()

    def _receive(self) -> bool:
        """Take in what has come, and wait for it where there is nothing to do; False at the end."""
        while True:
            is_idle = not (self._waiting or self._active)
            if is_idle and self._is_ending:
                return False
            try:
                pending = self._inbox.get(block=is_idle)
            except Empty:
                return True
            if pending is None:
                self._is_ending = True
            else:
                self._waiting.append(pending)
            del pending

    def _advance(self) -> None:
        """Prompts that begin, then a token for every row."""
        for pending in (*self._active, *self._waiting):
            pending.end_if_unwanted(is_closing=self._is_cancelled)
        self._waiting = deque(pending for pending in self._waiting if not pending.has_ended)
        self._drop_ended()
        self._begin()
        self._drop_ended()
        if self._active:
            tokens = [pending.row.choices[-1].token for pending in self._active]
            _push(self._active, self._model.decode_step(self._open_cache(), tokens))

    def _drop_ended(self) -> None:
        kept = [row for row, pending in enumerate(self._active) if not pending.has_ended]
        if len(kept) < len(self._active):
            kept = fill_holes(kept)
            self._open_cache().reorder(kept)
            self._active = [self._active[row] for row in kept]

    def _begin(self) -> None:
        """Compute the prompts of requests that have waited, those that came first."""
        new = self._next()
        if not new:
            return
        first = len(self._active)
        self._active += new
        cache = self._open_cache()
        cache.extend(len(new))
        for row, pending in enumerate(new, first):
            pending.fill(cache, row)
        self._drop_ended()
        rows = [row for row, pending in enumerate(self._active) if pending in new]
        if rows:
            begun = [self._active[row] for row in rows]
            prompts = [pending.row.unread_prompt for pending in begun]
            logits = self._model.prefill_step(cache, prompts, rows)
            for pending in begun:
                pending.row.watch.prefill = pending.row.watch.seconds()
            _push(begun, logits)

    def _next(self) -> list[PendingCompletion]:
        """Requests that begin now: as many as have room, and about a chunk of tokens."""
        new: list[PendingCompletion] = []
        tokens = 0
        while self._waiting and len(self._active) + len(new) < self._batch:
            tokens += len(self._waiting[0].row.unread_prompt)
            if new and tokens > self._model.prefill_chunk:
                break
            new.append(self._waiting.popleft())
        return new

    def _new_cache(self) -> KVCache:
        cache = self._model.new_cache(self._batch, self._length)
        cache.reorder([])
        return cache

    def _open_cache(self) -> KVCache:
        if self._cache is None:
            self._cache = self._new_cache()
        return self._cache

    def _close_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None


def _push(pendings: Iterable[PendingCompletion], logits: StepLogits) -> None:
    for pending, row in zip(pendings, logits, strict=True):
        pending.push(row)
