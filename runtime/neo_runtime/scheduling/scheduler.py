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
"""Seconds that the process's end waits for the step that is being computed."""

_running: weakref.WeakSet[RunningBatch] = weakref.WeakSet()
in_every_child(_running.clear)  # whose parent's threads are not there


@atexit.register
def _end_all() -> None:
    """A thread that computes while the process is taken down would crash it."""
    for batch in list(_running):
        batch.cancel()
        if not batch.join(_PATIENCE):
            _LOG.warning("a scheduler's thread does not end: a callback of a request blocks it")


class Scheduler(Closable):
    """Computes requests of many threads or coroutines in one batch that they join and leave.

        with neo_runtime.Scheduler(model, max_batch_size=8, max_length=1024) as scheduler:
            pending = scheduler.submit("Once upon a time", max_new_tokens=50)
            print(pending.result().text)

    Decoding reads all weights for each step, however many sequences it continues: requests that
    share the steps share that price. A request gets the result that it gets alone, up to float
    rounding (`Model.generate`). Requests begin in the order of `submit`, those of a `group` behind
    others whose group has fewer in the batch.

    The key/value cache for all sequences is allocated at once and held until `close`. The model
    may be used beside it as ever.
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
            max_batch_size: sequences computed together; others wait. By default 16 on a CPU, 32
                with CUDA, what a TensorRT plan takes, and fewer where `max_cache_bytes` leaves
                less room, or on a CPU the memory of the machine or of its container.
            max_length: tokens of a prompt and its continuation together, at most; by default as
                many as the model has positions. `model.cache_bytes(max_batch_size, max_length)` is
                what the cache takes: all of it on a GPU; on a CPU as far as it was written.
            prefix_cache_bytes: memory beside the cache for keys and values of what requests began
                with; a request computes only what no other before it began with. What was used
                longest ago makes room. 0: every prompt is computed whole. Texts may part at near
                ties where activations are rounded (int8, int4, half precision), since what was
                computed in other company is used.

        Raises:
            CacheLimitError: there is no room for the cache, or for the prefix cache.
            RequestError: a size that is no integer of at least 1, or a prefix cache that has no
                room for a block of 32 tokens.
            ContextLengthError: `max_length` is more than the model has.
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
            # With a prefix cache most prompts are read in a cache of their own.
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
        """Ask for one continuation of one prompt; returns at once.

        Args:
            prompt: text or token ids.
            options: as for `Model.generate`; no beam search, one sequence.
            bad_words: as for `Model.generate`.
            should_stop: asked before each token, and now and then while the request waits; once
                true, the completion ends as "cancelled". It runs in the scheduler's thread, as a
                `logits_processor` does: what it raises ends this request, and while it runs all
                others wait.
            prefix: as for `Model.generate`; its memory stays until the request has begun.
            sequence_index: which of several continuations of the prompt this is: with one `seed`
                each gets the draws that `generate(…, num_return_sequences=…)` gives it.
            group: requests with the same one, such as a client's, share the batch with others as
                if they were one; each of those without has a share of its own.
            **overrides: options by name.

        Returns:
            A future, which can be iterated for the text as it comes. The completion's timings
            count from this call, so that they include waiting.

        Raises:
            RequestError: a prompt or an option that cannot be honoured.
            ContextLengthError: prompt and continuation are more than `max_length`.
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
        """Sequences that are computed together."""
        return self._batch.size

    @property
    def generated_tokens(self) -> int:
        """Tokens of all requests so far."""
        return self._batch.generated_tokens

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._batch.waiting

    @property
    def unfinished(self) -> int:
        """Requests that wait or are computed; a service that has too many refuses more of them.

        Exact at any time, from any thread, as `waiting` and `active` are not while one becomes the
        other. A request that is cancelled counts until its sequence has left the batch.
        """
        return self._batch.unfinished

    @property
    def active(self) -> int:
        """Requests that are being computed."""
        return self._batch.active

    @property
    def prefix_cache_queries(self) -> int:
        """Tokens of prompts that were begun with a prefix cache."""
        return self._prefixes.queries if self._prefixes is not None else 0

    @property
    def prefix_cache_hits(self) -> int:
        """Those of them that were in the cache."""
        return self._prefixes.hits if self._prefixes is not None else 0

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, finish those that were taken, and free the cache.

        Args:
            cancel: do not finish them: they end as "cancelled" with the text so far.
        """
        if os.getpid() != self._process:
            return  # the parent's thread is not here
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
        """Close; after an error, such as Ctrl-C, without finishing."""
        self.close(cancel=kind is not None)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise NeoError(
                "the scheduler was made in another process, and its thread does not survive a "
                "fork; make one in each process"
            )


def _check_group(group: Hashable | None) -> None:
    """Refuse what has no hash; a tuple says so only when asked for it, as of a list within."""
    try:
        hash(group)
    except TypeError as error:
        raise RequestError(
            f"group is of type {type(group).__name__}, expected a hashable one: {error}"
        ) from error
