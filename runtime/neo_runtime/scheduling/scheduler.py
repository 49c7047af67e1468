"""Many requests over one model, computed together: continuous batching."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from neo_runtime.cached_model import CachedModel
from neo_runtime.closable import Closable, closed_on_error
from neo_runtime.errors import NeoError, RequestError
from neo_runtime.forks import in_every_child
from neo_runtime.generation.fitting import fitting_batch
from neo_runtime.generation.generator import never
from neo_runtime.generation.rows import make_rows
from neo_runtime.options.values import callback, count
from neo_runtime.scheduling.request import Request
from neo_runtime.scheduling.running_batch import RunningBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from types import TracebackType

    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.scheduling.pending import PendingCompletion
    from neo_runtime.text.prompts import Prompt

__all__ = ["Scheduler"]

_LOG = logging.getLogger("neo_runtime")
_PATIENCE = 30.0
"""Seconds to wait at the exit of the process for the current step of a scheduler."""

_running: weakref.WeakSet[RunningBatch] = weakref.WeakSet()
in_every_child(_running.clear)  # the parent's threads do not exist in the child


@atexit.register
def _end_all() -> None:
    """Stop all schedulers: a thread that computes while the process exits would crash it."""
    for batch in list(_running):
        batch.cancel()
        if not batch.join(_PATIENCE):
            _LOG.warning("a scheduler's thread does not end: a callback of a request blocks it")


class Scheduler(Closable):
    """Continuous batching: requests from many threads or coroutines share one running batch.

        with neo_runtime.Scheduler(model, max_batch_size=8, max_length=1024) as scheduler:
            pending = scheduler.submit("Once upon a time", max_new_tokens=50)
            print(pending.result().text)

    Each decode step reads all weights, however many sequences it continues, so requests in one
    batch share that cost. A request gets the result that it gets alone, up to float rounding (see
    `Model.generate`). Requests begin in the order of `submit`, except that requests whose `group`
    has fewer requests in the batch go first.

    The KV cache for all sequences is allocated at once and held until `close`. The model can be
    used directly at the same time.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        prefix_cache_bytes: int = 0,
    ) -> None:
        """Load the graphs, allocate the cache and start the thread that computes.

        Args:
            model: must stay open until the scheduler is closed.
            max_batch_size: most sequences to compute together; further requests wait. By default
                16 on a CPU, 32 with CUDA, or the batch size of a TensorRT plan; fewer where
                `max_cache_bytes`, or on a CPU the memory of the machine or container, leaves less
                room.
            max_length: most tokens of a prompt and its continuation together; by default the
                model's number of positions. The cache has
                `model.cache_bytes(max_batch_size, max_length)` bytes: on a GPU all of them are in
                use at once; on a CPU only the pages already written are.
            prefix_cache_bytes: additional memory for a prefix cache. It keeps the keys and values
                of earlier requests, so that a request computes only the part of its prompt that no
                earlier request began with. The least recently used blocks are evicted. 0: every
                prompt is computed whole. Where activations are rounded (int8, int4, half
                precision), texts may differ at near ties, since the reused values were computed in
                another batch.

        Raises:
            CacheLimitError: there is no room for the KV cache or the prefix cache.
            RequestError: a size is not an integer of at least 1 (`prefix_cache_bytes`: of at least
                0), or the prefix cache has no room for one block (at most 32 tokens).
            ContextLengthError: `max_length` is more than the model has positions.
        """
        if not isinstance(model, CachedModel):
            raise RequestError(
                f"model is of type {type(model).__name__}, expected neo_runtime.Model"
            )
        batch = count(1, optional=True)("max_batch_size", max_batch_size)
        length = count(1, optional=True)("max_length", max_length)
        size = count(0)("prefix_cache_bytes", prefix_cache_bytes)
        self._model = model
        self._max_length: int = length or model.manifest.max_length
        model.prepare()
        prefixes = self._prefixes = model.new_prefix_cache(size) if size else None
        with nullcontext() if prefixes is None else closed_on_error(prefixes):
            # With a prefix cache most prompts are computed in a cache of their own.
            batch = batch or fitting_batch(
                model, model.default_batch, self._max_length, spare=int(prefixes is not None)
            )
            self._batch = RunningBatch(model, batch, self._max_length, prefixes)
            self._end = weakref.finalize(self, self._batch.end)
            self._end.atexit = False  # see _end_all
            self._batch.start()
        _running.add(self._batch)
        self._process = os.getpid()

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        bad_words: Sequence[str] = (),
        should_stop: Callable[[], bool] = never,
        prefix: Prefix | None = None,
        sequence_index: int = 0,
        group: Hashable | None = None,
        **overrides: Any,
    ) -> PendingCompletion:
        """Request one continuation of one prompt; returns at once.

        Args:
            prompt: text or token ids.
            options: as for `Model.generate`, but without beam search and with one sequence.
            bad_words: as for `Model.generate`.
            should_stop: called before each token, and at intervals while the request waits; once it
                returns true, the completion ends as "cancelled". It runs in the scheduler's thread,
                as a `logits_processor` does: an exception ends only this request, but all requests
                wait while it runs.
            prefix: as for `Model.generate`; its memory is held until the request has begun.
            sequence_index: index of this continuation among several of the same prompt. With one
                `seed`, it gets the random draws of sequence `sequence_index` of
                `generate(…, num_return_sequences=…)`.
            group: any hashable value, such as a client's name. Requests of one group share the
                batch with others as one client; a request without a group counts as its own.
            **overrides: options by name.

        Returns:
            A future; iterating over it streams the text. The completion's timings count from this
            call, so they include waiting.

        Raises:
            RequestError: a prompt or an option cannot be honoured.
            ContextLengthError: prompt and continuation exceed `max_length`.
            NeoError: the scheduler is closed.
        """
        ids, chosen = self._model.single_prompt(
            "submit", prompt, options, bad_words, prefix, overrides
        )
        total = chosen.total_length(len(ids), self._max_length, "the scheduler")
        copy = count(0)("sequence_index", sequence_index)
        [row] = make_rows(self._model, ids, chosen, total, 0, prefix, copy)
        self._check_process()
        callback("should_stop", should_stop)
        _check_group(group)
        request = Request(row, should_stop, group)
        self._batch.put(request)
        return request.pending

    @property
    def max_batch_size(self) -> int:
        """Most sequences computed together."""
        return self._batch.size

    @property
    def generated_tokens(self) -> int:
        """Tokens generated for all requests so far."""
        return self._batch.generated_tokens

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._batch.waiting

    @property
    def unfinished(self) -> int:
        """Requests that wait or are being computed, for a service to limit them.

        Exact at any time, from any thread; `waiting` and `active` are not, while a request changes
        from one to the other. A cancelled request counts until its sequence has left the batch.
        """
        return self._batch.unfinished

    @property
    def active(self) -> int:
        """Requests that are being computed."""
        return self._batch.active

    @property
    def prefix_cache_queries(self) -> int:
        """Prompt tokens that were looked up in the prefix cache."""
        return self._prefixes.queries if self._prefixes is not None else 0

    @property
    def prefix_cache_hits(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return self._prefixes.hits if self._prefixes is not None else 0

    def close(self, *, cancel: bool = False) -> None:
        """Accept no more requests, finish those accepted, and free the cache.

        Args:
            cancel: do not finish them: they end as "cancelled" with the text so far.
        """
        if os.getpid() != self._process:
            return  # the parent's thread does not exist here
        if cancel:
            self._batch.cancel()
        self._batch.end()
        self._batch.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; after an error, such as Ctrl-C, cancel unfinished requests."""
        self.close(cancel=kind is not None)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise NeoError(
                "the scheduler was made in another process, and its thread does not survive a "
                "fork; make one in each process"
            )


def _check_group(group: Hashable | None) -> None:
    """Refuse a value that cannot be hashed; only `hash` itself finds a list inside a tuple."""
    try:
        hash(group)
    except TypeError as error:
        raise RequestError(
            f"group is of type {type(group).__name__}, expected a hashable one: {error}"
        ) from error
