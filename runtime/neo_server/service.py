"""Requests that share one scheduler: who is let in, what is computed, and who is cancelled."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from neo_runtime import Scheduler
from neo_runtime.closable import Closable
from neo_runtime.errors import RequestError
from neo_runtime.generation.prefix import behind
from neo_runtime.options.values import count

from neo_server.answers import Echo, Frame, Usage
from neo_server.errors import ApiError, bad_request, overloaded
from neo_server.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.scheduling.pending import PendingCompletion
    from numpy.typing import NDArray

    from neo_server.asked import Asked

__all__ = ["Limits", "Service", "Work"]

_WORTH_SHARING = 64
"""Tokens of a prompt from which on several continuations share what is computed of it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken at once."""

    max_batch_size: int | None = None
    """Sequences that are computed together; None: what suits the machine."""
    max_length: int | None = None
    """Tokens of a prompt and its continuation; None: the model's positions."""
    max_queue: int = 256
    """Sequences that are in the house, computed or waiting; more are refused with status 503."""
    max_body_bytes: int = 4 * 2**20
    """Of a request."""

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        for name in ("max_batch_size", "max_length"):
            count(1, optional=True)(name, getattr(self, name))
        for name in ("max_queue", "max_body_bytes"):
            count(1)(name, getattr(self, name))


@dataclass(eq=False)
class Work:
    """One request while it is computed; `end` must be called, however it ends."""

    service: Service
    asked: Asked
    frame: Frame
    prompts: list[NDArray[np.int64]] = field(default_factory=list)
    pending: list[PendingCompletion] = field(default_factory=list)
    """`best_of` for each prompt, those of a prompt together; none where no token is asked for."""
    usage: Usage = field(default_factory=Usage)
    has_ended: bool = False

    def end(self) -> None:
        """Cancel what is still computed, and make room."""
        if not self.has_ended:
            self.has_ended = True
            self.service.leave(self.asked.sequences)
        for pending in list(self.pending):
            pending.cancel()

    def add(self, pending: PendingCompletion) -> None:
        """One more continuation; from a thread, beside which `end` may be called."""
        self.pending.append(pending)
        if self.has_ended:
            pending.cancel()

    def of_prompt(self, index: int) -> list[PendingCompletion]:
        """The continuations of one prompt."""
        best_of = self.asked.best_of
        return self.pending[index * best_of : (index + 1) * best_of]

    def finished(self, completion: Completion) -> None:
        """Count it."""
        self.usage.completion_tokens += len(completion.token_ids)
        self.service.metrics.ended(completion)


class Service(Closable):
    """A model, and the scheduler that its requests share. Called from one event loop."""

    def __init__(self, model: Model, name: str, limits: Limits) -> None:
        """Check what would fail at every request; nothing is allocated before `start`.

        Raises:
            RequestError: the bundle has no tokenizer, or its generation_config.json cannot be
                honoured.
        """
        if model.tokenizer is None:
            raise RequestError(
                "the bundle has no tokenizer, so no text to serve; export it from a folder with one"
            )
        model.options()
        self.model, self.name, self.limits = model, name, limits
        self.max_length = limits.max_length or model.manifest.max_length
        self.tokenizer = model.tokenizer
        self.fingerprint = f"fp_{model.manifest.digest[:12]}"
        self.metrics = Metrics()
        self.metrics.watch("neo_sequences_waiting", "Sequences that wait", lambda: self._waiting)
        self.metrics.watch("neo_sequences_active", "Sequences being computed", lambda: self._active)
        self.metrics.watch(
            "neo_cache_bytes", "Bytes of key/value caches", lambda: model.cache_bytes_in_use
        )
        self._scheduler: Scheduler | None = None
        self._inside = 0
        self._sharing = Lock()
        self._cache_bytes = 0
        self._scorer: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Load the graphs and allocate the cache.

        Raises:
            CacheLimitError: there is no room for it.
        """
        # Room for one more sequence stays: for log probabilities of prompts, and what is shared.
        with self.model.new_cache(1, self.max_length):
            self._scheduler = Scheduler(
                self.model,
                max_batch_size=self.limits.max_batch_size,
                max_length=self.limits.max_length,
            )
        self._cache_bytes = self.model.cache_bytes_in_use
        self._scorer = ThreadPoolExecutor(1, "neo-scores")

    def close(self) -> None:
        """Free the cache; what is not finished ends."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close(cancel=True)
        if self._scorer is not None:
            self._scorer.shutdown(cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._scheduler is not None

    async def begin(self, asked: Asked) -> Work:
        """Let a request in and start computing.

        Raises:
            ApiError: another model's, too many sequences, or no room for them now.
            RequestError: a prompt or an option that cannot be honoured.
        """
        if asked.model is not None and asked.model != self.name:
            raise ApiError(
                404,
                f"the model {asked.model!r} is not here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        work = Work(self, asked, Frame(self.name, self.fingerprint))
        self._enter(asked.sequences)
        try:
            await asyncio.to_thread(self._submit, work)
        except BaseException:
            work.end()
            raise
        return work

    def _enter(self, sequences: int) -> None:
        most = self.limits.max_queue
        if sequences > most:
            raise bad_request(
                f"the request asks for {sequences} sequences, and at most {most} are taken at "
                "once; ask for fewer prompts or continuations at a time"
            )
        if self._inside + sequences > most:
            raise overloaded(f"{self._inside} sequences are being served, of {most} at most")
        self._inside += sequences

    def leave(self, sequences: int) -> None:
        """For `Work.end`."""
        self._inside -= sequences

    def _submit(self, work: Work) -> None:
        """In another thread, as long prompts take a while to tokenize."""
        asked, scheduler = work.asked, self._scheduler
        if scheduler is None:
            raise overloaded("the server is shutting down; try again")
        options: dict[str, Any] = dict(asked.options)
        bad_words = options.pop("bad_words", ())
        options["max_new_tokens"] = max(asked.max_tokens, 1)
        options["logprobs"] = asked.logprobs
        if asked.best_of > asked.n and asked.logprobs is None:
            options["logprobs"] = 0  # by which the best are chosen
        chosen = self.model.request_options(None, options, bad_words)
        work.prompts = self.model.encode_prompts(asked.prompts)
        for ids in work.prompts if asked.max_tokens else ():
            with self._shared(ids, asked) as prefix:
                for copy in range(asked.best_of):
                    if work.has_ended:
                        return
                    rest = behind(prefix, ids)
                    work.add(scheduler.submit(rest, chosen, prefix=prefix, sequence_index=copy))
        work.usage.prompt_tokens = sum(len(ids) for ids in work.prompts)
        self.metrics.begun(work.usage.prompt_tokens)

    @contextmanager
    def _shared(self, ids: NDArray[np.int64], asked: Asked) -> Iterator[Prefix | None]:
        """All of a prompt but its last token, computed once for several continuations.

        One at a time, as it takes memory until the last of them has begun; others do without.
        """
        prefix = None
        scores_prompt = asked.echo and asked.logprobs is not None  # which needs as much memory
        is_worth_it = asked.best_of > 1 and len(ids) > _WORTH_SHARING and not scores_prompt
        if is_worth_it and self._sharing.acquire(blocking=False):
            try:
                if self.model.cache_bytes_in_use <= self._cache_bytes:
                    with suppress(MemoryError):  # CacheLimitError and DeviceMemoryError are such
                        prefix = self.model.prefix(ids[:-1])
            finally:
                self._sharing.release()
        with prefix or nullcontext():
            yield prefix

    async def echoes(self, work: Work) -> list[Echo | None]:
        """What stands before the continuations of each prompt."""
        asked = work.asked
        if not asked.echo:
            return [None] * len(work.prompts)
        found: list[Echo | None] = []
        for given, ids in zip(asked.prompts, work.prompts, strict=True):
            text = given if isinstance(given, str) else self.tokenizer.decode(ids.tolist())
            scores = None
            if asked.logprobs is not None:
                scores = await asyncio.get_running_loop().run_in_executor(
                    self._scorer, self._scores, ids, asked.logprobs
                )
            found.append(Echo(text, int(ids[0]), scores))
        return found

    def _scores(self, ids: NDArray[np.int64], top: int) -> Any:
        return self.model.token_logprobs(ids, top_logprobs=top)

    @property
    def _waiting(self) -> int:
        return self._scheduler.waiting if self._scheduler is not None else 0

    @property
    def _active(self) -> int:
        return self._scheduler.active if self._scheduler is not None else 0
