"""Requests that share one scheduler: who is let in, what is computed, and who is cancelled."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from neo_runtime import Scheduler
from neo_runtime.backends.base import position_bytes
from neo_runtime.closable import Closable
from neo_runtime.errors import ContextLengthError, RequestError
from neo_runtime.generation.prefix import behind

from neo_server.answers import Echo, Frame, Usage
from neo_server.asked import refuse_alternatives
from neo_server.errors import ApiError, bad_request, overloaded, shutting_down
from neo_server.metrics import Metrics
from neo_server.scoring import PromptScorer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.scheduling.pending import PendingCompletion
    from numpy.typing import NDArray

    from neo_server.asked import Asked
    from neo_server.limits import Limits

__all__ = ["Service", "Work"]

_WORTH_SHARING = 64
"""Tokens of a prompt from which on several continuations share what is computed of it."""


@dataclass(eq=False)
class Work:
    """One request while it is computed; `end` must be called, however it ends."""

    service: Service
    asked: Asked
    frame: Frame
    places: int
    """Sequences of it that are not among `pending`; each of those leaves by itself."""
    prompts: list[NDArray[np.int64]] = field(default_factory=list)
    pending: list[PendingCompletion] = field(default_factory=list)
    """`best_of` for each prompt, those of a prompt together; none where no token is asked for."""
    usage: Usage = field(default_factory=Usage)
    has_ended: bool = False

    def add(self, pending: PendingCompletion) -> None:
        """One more continuation; from a thread, beside which `end` may be called."""
        with self.service.counting:
            self.pending.append(pending)
            is_late = self.has_ended
            if not is_late:
                self.places -= 1
        if is_late:
            self._cancel([pending])
        else:
            pending.add_done_callback(lambda _: self.service.leave(1))

    def end(self) -> None:
        """Cancel what is still computed, and make room."""
        with self.service.counting:
            if self.has_ended:
                return
            self.has_ended = True
            pending = list(self.pending)
        self.service.leave(self.places)
        self._cancel(pending)

    def _cancel(self, pending: Iterable[PendingCompletion]) -> None:
        for one in pending:
            if one.cancel():
                self.service.metrics.cancelled()

    def of_prompt(self, index: int) -> list[PendingCompletion]:
        """The continuations of one prompt."""
        best_of = self.asked.best_of
        return self.pending[index * best_of : (index + 1) * best_of]

    def finished(self, completion: Completion) -> None:
        """Count it."""
        self.usage.completion_tokens += len(completion.token_ids)
        self.service.metrics.ended(completion)

    def whole_usage(self) -> dict[str, Any]:
        """What was used, once all continuations are done; each prompt as its first one found it."""
        if self.service.limits.prefix_cache_bytes:
            first = [one.result() for one in self.pending[:: self.asked.best_of]]
            self.usage.cached_tokens = sum(one.timings.cached_prompt_tokens for one in first)
        return self.usage.json


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
        for name, text in (
            ("queries", "Tokens of prompts that were begun with a prefix cache"),
            ("hits", "Those of them that were in the cache"),
        ):
            total = partial(self._prefix_cache, name)
            self.metrics.watch_total(f"neo_prefix_cache_{name}", text, total)
        self.metrics.watch(
            "neo_cache_bytes", "Bytes of key/value caches", lambda: model.cache_bytes_in_use
        )
        self._scheduler: Scheduler | None = None
        self._let_in = 0
        """Sequences that have not ended."""
        self.counting = Lock()
        """Held for moments: the event loop takes it."""
        self._sharing = Lock()
        self._cache_bytes = 0
        self._scorer: PromptScorer | None = None

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
                prefix_cache_bytes=self.limits.prefix_cache_bytes,
            )
        self._cache_bytes = self.model.cache_bytes_in_use
        self._scorer = PromptScorer(self.model)

    def close(self) -> None:
        """Free the cache; what is not finished ends."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close(cancel=True)
        if self._scorer is not None:
            self._scorer.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._scheduler is not None

    def check_started(self) -> None:
        """Raises ApiError where nobody has started the service."""
        if self._scorer is None:
            raise ApiError(500, "the application was not started: the server must run its lifespan")

    def open(self, asked: Asked) -> Work:
        """Let a request in.

        Raises:
            ApiError: another model's, too many sequences, or no room for them now.
        """
        if asked.model is not None and asked.model != self.name:
            raise ApiError(
                404,
                f"the model {asked.model!r} is not here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        most, sequences = self.limits.max_queue, asked.sequences
        if sequences > most:
            raise bad_request(
                f"the request asks for {sequences} sequences, and at most {most} are taken at "
                "once; ask for fewer prompts or continuations at a time"
            )
        with self.counting:
            inside = self._now_inside
            if inside + sequences > most:
                raise overloaded(
                    f"{inside} of at most {most} sequences are being served, and the request asks "
                    f"for {sequences}; try again"
                )
            self._let_in += sequences
        return Work(self, asked, Frame(self.name, self.fingerprint), sequences)

    @property
    def inside(self) -> int:
        """Sequences that are computed, wait, or are about to."""
        with self.counting:
            return self._now_inside

    @property
    def _now_inside(self) -> int:
        """Those that were let in; or, if these are more, those with what was cancelled just now."""
        return max(self._let_in, int(getattr(self._scheduler, "unfinished", 0)))

    def leave(self, sequences: int) -> None:
        """For `Work`: they have ended."""
        with self.counting:
            self._let_in -= sequences

    async def begin(self, work: Work) -> None:
        """Start computing.

        Raises:
            RequestError: a prompt or an option that cannot be honoured.
        """
        await asyncio.to_thread(self._submit, work)

    def _submit(self, work: Work) -> None:
        """In another thread: to check and to tokenize may take a while."""
        asked, scheduler = work.asked, self._scheduler
        if scheduler is None:
            raise shutting_down()
        chosen = self._options(asked)
        work.prompts = self._encoded(asked, chosen)
        work.usage.prompt_tokens = sum(map(len, work.prompts))
        self.metrics.begun(work.usage.prompt_tokens)
        for ids in work.prompts if asked.max_tokens else ():
            with self._shared(ids, asked) as prefix:
                for copy in range(asked.best_of):
                    if work.has_ended:
                        return
                    rest = behind(prefix, ids)
                    work.add(scheduler.submit(rest, chosen, prefix=prefix, sequence_index=copy))

    def _options(self, asked: Asked) -> GenerationOptions:
        options: dict[str, Any] = dict(asked.options)
        bad_words = options.pop("bad_words", ())
        options["max_new_tokens"] = max(asked.max_tokens, 1)
        options["logprobs"] = asked.logprobs
        if asked.best_of > asked.n and asked.logprobs is None:
            options["logprobs"] = 0  # by which the best are chosen
        if asked.form is not None:
            try:
                options["grammar"] = self.model.grammar(**asked.form.sources)
            except RequestError as error:
                raise bad_request(str(error), asked.form.field) from error
            # The bundle's own would cut the form, and is nothing that the client asked for.
            options.setdefault("forced_eos_token_id", ())
        return self.model.request_options(None, options, bad_words)

    def _encoded(self, asked: Asked, chosen: GenerationOptions) -> list[NDArray[np.int64]]:
        """Ids of all prompts, each of which leaves room for what is asked for.

        Raises:
            ContextLengthError: one does not.
        """
        longest = self.max_length * self.tokenizer.longest_token
        for prompt in asked.prompts:
            if len(prompt) > longest:  # which need not be tokenized to know
                raise ContextLengthError(
                    f"a prompt of {len(prompt)} characters or tokens has more than the "
                    f"{self.max_length} tokens that this server takes; shorten it"
                )
        prompts = self.model.encode_prompts(asked.prompts)
        refuse_alternatives(asked, [len(ids) for ids in prompts])
        for ids in prompts:
            if asked.max_tokens:
                chosen.total_length(len(ids), self.max_length, "the server")
            elif len(ids) > self.max_length:
                raise ContextLengthError(
                    f"a prompt has {len(ids)} tokens and the server {self.max_length} positions; "
                    "shorten it"
                )
        return prompts

    @contextmanager
    def _shared(self, ids: NDArray[np.int64], asked: Asked) -> Iterator[Prefix | None]:
        """All of a prompt but its last token, computed once for several continuations.

        One at a time, as it takes memory until the last of them has begun; others do without. A
        prefix cache that has room for the prompt does the same.
        """
        prefix = None
        is_worth_it = asked.best_of > 1 and len(ids) > _WORTH_SHARING
        # Where memory is limited, what is left is for the prompts that are scored.
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

    async def echoes(self, work: Work) -> list[Echo | None]:
        """What stands before the continuations of each prompt."""
        asked = work.asked
        if not asked.echo:
            return [None] * len(work.prompts)
        found: list[Echo | None] = []
        for given, ids in zip(asked.prompts, work.prompts, strict=True):
            if isinstance(given, str):
                text = given
            else:
                text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            scores = None
            if asked.logprobs is not None:
                assert self._scorer is not None
                scores = await self._scorer.scores(ids, asked.logprobs)
            found.append(Echo(text, int(ids[0]), scores))
        return found

    def _prefix_cache(self, name: str) -> int:
        return getattr(self._scheduler, f"prefix_cache_{name}", 0)

    @property
    def _waiting(self) -> int:
        return self._scheduler.waiting if self._scheduler is not None else 0

    @property
    def _active(self) -> int:
        return self._scheduler.active if self._scheduler is not None else 0
