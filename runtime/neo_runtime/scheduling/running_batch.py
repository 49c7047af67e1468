"""A batch that requests join and leave while it runs: continuous batching, in one thread.

    inbox ──▶ waiting ──prefill──▶ active: row i of the cache ──decode, a token a step──▶ ended
                 └──chunk by chunk──▶ prefilling: a cache of its own ──copied──┘

Between two decode steps, ended rows leave the cache and waiting requests take their places: as many
as there is room for, and at most one chunk of prompt tokens in all. A prompt longer than a chunk is
computed in a cache of its own, one chunk between two steps. So neither the running requests nor
those that arrived later wait for the whole prompt.
"""

from __future__ import annotations

import copy
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError
from neo_runtime.generation.feeding import feed
from neo_runtime.generation.generator import fill_holes
from neo_runtime.scheduling.chunked_prefill import ChunkedPrefill
from neo_runtime.scheduling.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cache.prefix_cache import PrefixCache
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.scheduling.request import Request

__all__ = ["RunningBatch"]

_CLOSED = "the scheduler is closed; make another one"


class RunningBatch:
    """See the module docstring.

    `put`, `end` and `cancel` hold no lock, so signal handlers and finalizers may call them.
    """

    def __init__(
        self, model: CachedModel, batch: int, length: int, prefixes: PrefixCache | None
    ) -> None:
        """Allocate the cache; `start` must be called next.

        Args:
            model: computes the logits.
            batch: most sequences at once.
            length: most positions of a sequence.
            prefixes: the prefix cache, if any; the thread closes it when it ends.

        Raises:
            CacheLimitError: there is no room for the cache.
        """
        self._model, self.size, self._length = model, batch, length
        self._prefixes = prefixes
        self._inbox: SimpleQueue[Request | None] = SimpleQueue()
        self._waiting = WaitingQueue(model.prefill_chunk, prefixes)
        self._unfinished: set[Request] = set()
        self._active: list[Request] = []
        """The request in each row of the cache."""
        self._prefilling: ChunkedPrefill | None = None
        self.generated_tokens = 0
        """Tokens generated for all requests."""
        self._is_ending = self._is_cancelled = self._has_stopped = False
        self._cache: KVCache | None = self._new_cache()
        # A daemon thread: one that waits for work does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="neo-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread. If this is interrupted (Ctrl-C), a thread already running ends."""
        try:
            self._thread.start()
        except BaseException:
            self.end()
            raise

    def put(self, request: Request) -> None:
        """Add a request.

        Raises:
            NeoError: `end` was called.
        """
        if self._is_ending:
            request.fail(NeoError(_CLOSED))
            raise NeoError(_CLOSED)
        request.pending.computed_by(self._thread.ident)
        request.join(self._unfinished)
        self._inbox.put(request)
        if self._has_stopped:  # meanwhile
            self._refuse_inbox()

    def end(self) -> None:
        """Stop once all requests are done."""
        if not self._is_ending:
            self._is_ending = True
            self._inbox.put(None)  # wakes the thread

    def cancel(self) -> None:
        """Stop before the next token: unfinished requests end as "cancelled"."""
        self._is_cancelled = True
        self.end()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has stopped. In that thread itself (a callback), return at once.

        Returns:
            False if the thread was still running after `timeout` seconds.
        """
        if self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Requests that were put and have not ended; each is counted exactly once."""
        return len(self._unfinished)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting) + self._inbox.qsize()

    @property
    def active(self) -> int:
        """Requests that are being computed."""
        return sum(not one.has_ended for one in self._active) + len(self._prefilling_requests)

    @property
    def _prefilling_requests(self) -> list[Request]:
        prefilling = self._prefilling  # once: callers may be in other threads
        return [] if prefilling is None else [prefilling.request]

    def _run(self) -> None:
        try:
            while self._receive():
                try:
                    self._advance()
                except BaseException as error:
                    self._fail(error)
        finally:
            self._drop_caches()
            if self._prefixes is not None:
                self._prefixes.close()
            self._is_ending = self._has_stopped = True
            self._refuse_inbox()

    def _fail(self, error: BaseException) -> None:
        """End the requests being computed: the contents of the caches are now undefined.

        If none is being computed, choosing the next request failed and would fail again: then all
        requests end.
        """
        requests = [*self._active, *self._prefilling_requests] or list(self._unfinished)
        self._active = []
        self._drop_caches()
        for request in requests:
            request.fail(_own(error))
        self._waiting.drop_ended()

    def _refuse_inbox(self) -> None:
        while True:
            try:
                request = self._inbox.get(block=False)
            except Empty:
                return
            if request is not None:
                request.fail(NeoError(_CLOSED))

    def _receive(self) -> bool:
        """Move new requests to the queue; wait for one if there is nothing to do. False: stop."""
        while True:
            is_idle = not (self._waiting or self._active or self._prefilling)
            try:
                request = self._inbox.get(block=is_idle and not self._is_ending)
            except Empty:
                return not is_idle
            if request is not None:
                self._waiting.append(request)
            del request

    def _advance(self) -> None:
        """One step: a limited number of prompt tokens, then one decode step for all rows."""
        self._look_around()
        self._drop_ended()
        if self._prefilling is not None:
            self._go_on_prefilling(self._prefilling)
            self._drop_ended()
        self._begin()
        self._drop_ended()
        if self._active:
            rows = [request.row for request in self._active]
            cache = self._open_cache()
            self._push(self._active, feed(self._model, cache, rows, self._waiting.chunk))
            for row, request in enumerate(self._active):
                request.keep(cache, row)

    def _look_around(self) -> None:
        """End unwanted requests; waiting ones are checked at intervals and when they begin."""
        for request in self._active:
            request.end_if_unwanted(is_closing=self._is_cancelled)
        if self._prefilling is not None:
            self._prefilling.request.end_if_unwanted(is_closing=self._is_cancelled)
            if self._prefilling.request.has_ended:
                self._prefilling.close()
                self._prefilling = None
        self._waiting.sweep(is_closing=self._is_cancelled)

    def _drop_ended(self) -> None:
        kept = [row for row, request in enumerate(self._active) if not request.has_ended]
        if len(kept) < len(self._active):
            kept = fill_holes(kept)
            self._open_cache().reorder(kept)
            self._active = [self._active[row] for row in kept]

    def _begin(self) -> None:
        """Prefill the waiting requests whose turn it is."""
        room = self.size - self.active
        new = self._waiting.next(room, self._active, self._prefilling_requests)
        if len(new) == 1 and self._waiting.is_long(new[0]) and self._start_chunked_prefill(new[0]):
            return
        if new:
            rows = range(len(self._active), len(self._active) + len(new))
            self._active += new
            cache = self._open_cache()
            cache.extend(len(new))
            for row, request in zip(rows, new, strict=True):
                request.fill(cache, row)
            prompts = [request.unread_prompt for request in new]
            chunk = self._waiting.chunk
            for start in range(0, len(prompts[0]), chunk):  # several prompts fit one chunk each
                chunks = [prompt[start : start + chunk] for prompt in prompts]
                logits = self._model.prefill_step(cache, chunks, rows)
                for row, request in zip(rows, new, strict=True):
                    request.keep(cache, row)
            self._first_tokens(new, logits)

    def _start_chunked_prefill(self, request: Request) -> bool:
        """Begin a long prompt; False if there is no room for another cache."""
        try:
            self._prefilling = ChunkedPrefill(self._model, request, self._waiting.chunk)
        except MemoryError:  # includes CacheLimitError and DeviceMemoryError
            return False
        except BaseException as error:
            request.fail(error)
        return True

    def _go_on_prefilling(self, prefilling: ChunkedPrefill) -> None:
        """Compute a chunk of a long prompt; after the last chunk its row joins the batch."""
        logits = prefilling.compute_chunk()
        if logits is not None:
            cache, row = self._open_cache(), len(self._active)
            self._active.append(prefilling.request)
            self._prefilling = None
            with prefilling:
                cache.extend(1)
                cache.copy_from(prefilling.cache, [row])
                self._first_tokens([prefilling.request], logits)

    def _first_tokens(self, requests: Sequence[Request], logits: StepLogits) -> None:
        for request in requests:
            request.row.watch.prefill = request.row.watch.seconds()
        self._push(requests, logits)

    def _push(self, requests: Sequence[Request], logits: StepLogits) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.generated_tokens += request.choose(row)
            request.tell()  # after the count, so that a reader finds its tokens counted

    def _new_cache(self) -> KVCache:
        cache = self._model.new_cache(self.size, self._length)
        cache.reorder([])
        return cache

    def _open_cache(self) -> KVCache:
        if self._cache is None:
            self._cache = self._new_cache()
        return self._cache

    def _drop_caches(self) -> None:
        for held in (self._cache, self._prefilling):
            if held is not None:
                held.close()
        self._cache = self._prefilling = None


def _own(error: BaseException) -> BaseException:
    """A copy of an error, so that each of several requests raises one with its own traceback."""
    try:
        own = copy.copy(error)
    except Exception:
        own = NeoError(f"a step of the batch failed: {error!r}")
    own.__traceback__, own.__cause__ = None, error
    return own
