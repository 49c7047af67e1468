"""Computes requests, which share one scheduler."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import neo_runtime
from neo_runtime import Scheduler
from neo_runtime.backends.base import position_bytes
from neo_runtime.closable import Closable
from neo_runtime.errors import RequestError
from neo_runtime.generation.fitting import memory_for_caches
from neo_runtime.generation.prefix import behind

from neo_server.answers import Frame
from neo_server.asked import read_request
from neo_server.encoding import encoded
from neo_server.errors import ApiError, bad_request, shutting_down, unknown_model
from neo_server.metrics import Metrics
from neo_server.one_thread import OneThread
from neo_server.scoring import PromptScorer
from neo_server.work import Room, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.options.grammar import Grammar
    from numpy.typing import NDArray

    from neo_server.asked import Asked
    from neo_server.follow import Followed
    from neo_server.limits import Limits

__all__ = ["Service"]

_LOG = logging.getLogger("neo_server")
_COMPLETIONS = "/v1/completions"
_WORTH_SHARING = 64
"""A prompt of more tokens than this is computed once for all of its continuations."""


class Service(Closable):
    """A model, and the scheduler that its requests share. Called from one event loop."""

    def __init__(self, model: Model, name: str, limits: Limits) -> None:
        """Check for problems that every request would have; nothing is allocated before `start`.

        Raises:
            RequestError: the bundle has no tokenizer, its generation_config.json cannot be
                honoured, or the name is empty.
        """
        if model.tokenizer is None:
            raise RequestError(
                "the bundle has no tokenizer, so no text to serve; export it from a folder with one"
            )
        if not name:
            raise RequestError("the model's name is empty; expected what clients are to call it")
        self.model, self.name, self.limits = model, name, limits
        for temperature in (0, 1):  # check generation_config.json for greedy and sampling requests
            self._options(read_request({"prompt": "x", "temperature": temperature}))
        self.max_length = limits.max_length or model.manifest.max_length
        self.tokenizer = model.tokenizer
        self.fingerprint = f"fp_{model.manifest.digest[:12]}"
        self.metrics = Metrics()
        self._watch()
        self.is_leaving = False
        """Set before shutdown: requests are still accepted, but new ones should go elsewhere."""
        self._scheduler: Scheduler | None = None
        self.room = Room(limits.max_queue, lambda: getattr(self._scheduler, "unfinished", 0))
        self._sharing = Lock()
        self._forms: OneThread | None = None
        self._cache_bytes = self._last_generated = 0
        self._scorer: PromptScorer | None = None

    def _watch(self) -> None:
        """Register the metrics whose values are read from here."""
        metrics, manifest = self.metrics, self.model.manifest
        metrics.watch("neo_sequences_waiting", "Sequences that wait", lambda: self._waiting)
        metrics.watch("neo_sequences_active", "Sequences being computed", lambda: self._active)
        for name, text in (
            ("queries", "Tokens of prompts that were begun with a prefix cache"),
            ("hits", "Those of them that were in the cache"),
        ):
            total = partial(self._prefix_cache, name)
            metrics.watch_total(f"neo_prefix_cache_{name}", text, total)
        metrics.watch(
            "neo_cache_bytes", "Bytes of key/value caches", lambda: self.model.cache_bytes_in_use
        )
        metrics.watch_total("neo_generated_tokens", "Tokens generated", lambda: self._generated)
        metrics.watch("neo_queue_limit", "Sequences taken at once", lambda: self.limits.max_queue)
        metrics.watch("neo_batch_limit", "Sequences computed together", lambda: self.batch)
        metrics.tell(
            "neo_info",
            "What is served",
            version=neo_runtime.__version__,
            model=self.name,
            precision=manifest.precision,
            backend=self.model.backend,
            digest=manifest.digest[:12],
        )

    def start(self) -> None:
        """Load the graphs and allocate the cache.

        Raises:
            CacheLimitError: there is no room for it.
        """
        # Leave room for one more sequence: for log probabilities of prompts, and shared prompts.
        with self.model.new_cache(1, self.max_length):
            self._scheduler = Scheduler(
                self.model,
                max_batch_size=self.limits.max_batch_size,
                max_length=self.limits.max_length,
                prefix_cache_bytes=self.limits.prefix_cache_bytes,
            )
        self._cache_bytes = self.model.cache_bytes_in_use
        self._warn_of_memory()
        self._scorer, self._forms = PromptScorer(self.model), OneThread("neo-forms")

    def _warn_of_memory(self) -> None:
        room = memory_for_caches(self.model)
        size = self.model.cache_bytes(self.batch, self.max_length)
        if room is not None and room < size:
            _LOG.warning(
                "the cache may grow to %.0f MB, and this process may have %.0f MB for it: under "
                "load the system will end it; choose a smaller --max-batch-size or --max-length, "
                "or give it more memory",
                size / 1e6,
                room / 1e6,
            )

    def close(self) -> None:
        """Free the cache; unfinished requests end."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close(cancel=True)
        for held in (self._scorer, self._forms):
            if held is not None:
                held.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._scheduler is not None

    def check_started(self) -> None:
        """Raise ApiError if the service was not started."""
        if self._scorer is None:
            raise ApiError(500, "the application was not started: the server must run its lifespan")

    def answered(self, request: Followed) -> None:
        """Count a request that has ended."""
        if request.method == "POST" and request.path.endswith(_COMPLETIONS):
            self.metrics.answered(request.status or 500, request.seconds)

    def open(self, asked: Asked, request: Followed) -> Work:
        """Admit a request.

        Raises:
            ApiError: it names another model, has too many sequences, or there is no room for them
                now.
        """
        if asked.model is not None and asked.model != self.name:
            raise unknown_model(asked.model, self.name)
        most, sequences = self.limits.most_sequences, asked.sequences
        if sequences > most:
            raise bad_request(
                f"the request asks for {sequences} sequences, and at most {most} are taken of one "
                "request; ask for fewer prompts or continuations at a time"
            )
        self.room.enter(sequences)
        seconds = self.limits.request_seconds
        now = asyncio.get_running_loop().time() - request.seconds
        work = Work(
            asked=asked,
            frame=Frame(self.name, self.fingerprint, f"cmpl-{request.id}"),
            seconds=seconds,
            deadline=None if seconds is None else now + seconds,
            room=self.room,
            metrics=self.metrics,
            tokenizer=self.tokenizer,
            scorer=self._scorer,
            places=sequences,
            tells_cached=self.limits.prefix_cache_bytes > 0,
        )
        request.usage = work.usage
        return work

    async def begin(self, work: Work) -> None:
        """Start computing.

        Raises:
            RequestError: a prompt or an option cannot be honoured.
        """
        grammar = None
        if (form := work.asked.form) is not None:
            assert self._forms is not None, "see check_started"
            grammar = await self._forms.run(form.compiled, self.model)
        await asyncio.to_thread(self._submit, work, grammar)

    def _submit(self, work: Work, grammar: Grammar | None) -> None:
        """Validate, tokenize and submit; runs in a worker thread, as this may take a while."""
        asked, scheduler = work.asked, self._scheduler
        if scheduler is None:
            raise shutting_down()
        chosen = self._options(asked, grammar)
        work.prompts = encoded(self.model, asked, chosen, self.max_length)
        work.usage.prompt_tokens = sum(map(len, work.prompts))
        self.metrics.begun(work.usage.prompt_tokens)
        for ids in work.prompts if asked.max_tokens else ():
            with self._shared(ids, asked) as prefix:
                for copy in range(asked.best_of):
                    if work.has_ended:
                        return
                    rest = behind(prefix, ids)
                    work.add(
                        scheduler.submit(
                            rest, chosen, prefix=prefix, sequence_index=copy, group=id(work)
                        )
                    )

    def _options(self, asked: Asked, grammar: Grammar | None = None) -> GenerationOptions:
        options: dict[str, Any] = dict(asked.options)
        bad_words = options.pop("bad_words", ())
        options["max_new_tokens"] = max(asked.max_tokens, 1)
        options["logprobs"] = asked.logprobs
        if asked.best_of > asked.n and asked.logprobs is None:
            options["logprobs"] = 0  # the best are chosen by them
        if grammar is not None:
            options["grammar"] = grammar
            # The bundle's own would cut the form, and is nothing that the client asked for.
            options.setdefault("forced_eos_token_id", ())
        chosen = self.model.request_options(None, options, bad_words)
        if not asked.stop_token_ids:
            return chosen
        ending = (*chosen.active_eos, *asked.stop_token_ids)
        return replace(chosen, eos_token_id=ending, ignore_eos=False)

    @contextmanager
    def _shared(self, ids: NDArray[np.int64], asked: Asked) -> Iterator[Prefix | None]:
        """A prefix of all tokens of a prompt but the last, shared by its continuations.

        None if it is not worth it, if there is no room, if another prompt is being shared (one at a
        time, as it takes memory until its last continuation has begun), or if the prefix cache has
        room for the prompt and so has the same effect.
        """
        prefix = None
        is_worth_it = asked.best_of > 1 and len(ids) > _WORTH_SHARING
        # With a limit on cache memory, the rest is reserved for log probabilities of prompts.
        has_room = self.model.cache_bytes_left is None
        is_kept = len(ids) * position_bytes(self.model.manifest) <= self.limits.prefix_cache_bytes
        if is_worth_it and has_room and not is_kept and self._sharing.acquire(blocking=False):
            try:
                if self.model.cache_bytes_in_use <= self._cache_bytes:
                    with suppress(MemoryError):
                        prefix = self.model.prefix(ids[:-1])
            finally:
                self._sharing.release()
        with prefix or nullcontext():
            yield prefix

    def _prefix_cache(self, name: str) -> int:
        return getattr(self._scheduler, f"prefix_cache_{name}", 0)

    @property
    def described(self) -> str:
        """The limits, in one line."""
        size = self.model.cache_bytes(self.batch, self.max_length) / 1e6
        limits = self.limits
        more = "" if limits.request_seconds is None else f", each for {limits.request_seconds:g} s"
        return (
            f"{self.batch} sequences of up to {self.max_length} tokens at once, their cache up to "
            f"{size:,.0f} MB; {limits.max_queue} with those that wait, "
            f"{limits.most_sequences} of one request{more}"
        )

    @property
    def batch(self) -> int:
        """Most sequences computed together; 0 before `start` and after `close`."""
        return self._scheduler.max_batch_size if self._scheduler is not None else 0

    @property
    def _generated(self) -> int:
        if self._scheduler is not None:
            self._last_generated = self._scheduler.generated_tokens
        return self._last_generated

    @property
    def _waiting(self) -> int:
        return self._scheduler.waiting if self._scheduler is not None else 0

    @property
    def _active(self) -> int:
        return self._scheduler.active if self._scheduler is not None else 0
