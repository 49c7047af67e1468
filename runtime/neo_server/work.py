"""Admission of requests, and the state of one request while it is computed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from neo_runtime.scheduling.pending import PendingCompletion

from neo_server.answers import Echo, Usage
from neo_server.errors import overloaded, too_late

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    import numpy as np
    from neo_runtime.generation.completion import Completion
    from neo_runtime.text.tokenizer import Tokenizer
    from numpy.typing import NDArray

    from neo_server.answers import Frame
    from neo_server.asked import Asked
    from neo_server.metrics import Metrics
    from neo_server.scoring import PromptScorer

__all__ = ["Room", "Work"]

_Result = TypeVar("_Result")


class Room:
    """Admission control: limits the number of sequences at once."""

    def __init__(self, most: int, unfinished: Callable[[], int]) -> None:
        """Begin with none.

        Args:
            most: most sequences at once.
            unfinished: the number of sequences in the scheduler.
        """
        self.most = most
        self.counting = Lock()
        """Held only for moments, as the event loop takes it."""
        self._let_in = 0
        """Sequences that entered and have not left."""
        self._unfinished = unfinished

    def enter(self, sequences: int) -> None:
        """Admit all sequences of a request, or none.

        Raises:
            ApiError: there is no room for all of them now.
        """
        with self.counting:
            inside = self._now_inside
            if inside + sequences > self.most:
                raise overloaded(
                    f"{inside} of at most {self.most} sequences are being served, and the request "
                    f"asks for {sequences}; try again"
                )
            self._let_in += sequences

    def leave(self, sequences: int) -> None:
        """Count sequences that have ended."""
        with self.counting:
            self._let_in -= sequences

    @property
    def let_in(self) -> int:
        """Sequences that entered and have not left."""
        with self.counting:
            return self._let_in

    @property
    def inside(self) -> int:
        """Sequences that are computed, wait, or are about to be submitted."""
        with self.counting:
            return self._now_inside

    @property
    def _now_inside(self) -> int:
        """The larger of two counts: admitted sequences, and those still in the scheduler.

        A cancelled sequence leaves here at once, but the scheduler only before its next step.
        """
        return max(self._let_in, self._unfinished())


@dataclass(eq=False, kw_only=True)
class Work:
    """One request while it is computed; `end` must always be called."""

    asked: Asked
    frame: Frame
    room: Room
    metrics: Metrics
    tokenizer: Tokenizer
    scorer: PromptScorer | None
    """None before the service is started."""
    places: int
    """Admitted sequences not yet in `pending`; those in it leave the `Room` by themselves."""
    seconds: float | None
    """Most seconds it may take; None: no limit."""
    tells_cached: bool
    """Whether the usage includes the number of tokens found in the prefix cache."""
    prompts: list[NDArray[np.int64]] = field(default_factory=list)
    pending: list[PendingCompletion] = field(default_factory=list)
    """`best_of` for each prompt, those of a prompt adjacent; empty if `max_tokens` is 0."""
    usage: Usage = field(default_factory=Usage)
    deadline: float | None = None
    """By the event loop's clock; None: no limit."""
    has_ended: bool = False
    is_told: bool = False
    """Whether the stream has delivered the whole answer or its error."""

    def add(self, pending: PendingCompletion) -> None:
        """Add a continuation; called from a worker thread, while `end` may be called in another."""
        with self.room.counting:
            self.pending.append(pending)
            is_late = self.has_ended
            if not is_late:
                self.places -= 1
        pending.add_done_callback(self._count)
        if is_late:
            pending.cancel()
        else:
            pending.add_done_callback(lambda _: self.room.leave(1))

    def end(self) -> None:
        """Cancel unfinished continuations, and leave the `Room`."""
        with self.room.counting:
            if self.has_ended:
                return
            self.has_ended = True
            pending = list(self.pending)
        self.room.leave(self.places)
        for one in pending:
            one.cancel()

    async def in_time(self, waiting: Awaitable[_Result]) -> _Result:
        """Wait for something until the deadline.

        Raises:
            ApiError: the deadline has passed.
        """
        limit = asyncio.timeout_at(self.deadline)
        try:
            async with limit:
                return await waiting
        except TimeoutError:
            if not limit.expired():
                raise
            raise too_late(self.seconds or 0) from None

    def _count(self, pending: Future[Completion]) -> None:
        """Update the metrics; runs in the thread that ended the continuation."""
        if isinstance(pending, PendingCompletion):
            self.metrics.left(pending)

    def of_prompt(self, index: int) -> list[PendingCompletion]:
        """The continuations of one prompt."""
        best_of = self.asked.best_of
        return self.pending[index * best_of : (index + 1) * best_of]

    def finished(self, completion: Completion) -> None:
        """Count the tokens of a completion."""
        self.usage.completion_tokens += len(completion.token_ids)

    def whole_usage(self) -> dict[str, Any]:
        """The usage, once all continuations are done.

        The cached tokens of a prompt are those of its first continuation.
        """
        if self.tells_cached:
            first = [one.result() for one in self.pending[:: self.asked.best_of]]
            self.usage.cached_tokens = sum(one.timings.cached_prompt_tokens for one in first)
        return self.usage.json

    async def echoes(self) -> list[Echo | None]:
        """The echo of each prompt; None for all if the request has no `echo`."""
        asked = self.asked
        if not asked.echo:
            return [None] * len(self.prompts)
        found: list[Echo | None] = []
        for given, ids in zip(asked.prompts, self.prompts, strict=True):
            if isinstance(given, str) and asked.truncate_prompt_tokens is None:
                text = given
            else:
                text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            scores = None
            if asked.logprobs is not None:
                assert self.scorer is not None
                scores = await self.scorer.scores(ids, asked.logprobs)
            found.append(Echo(text, int(ids[0]), scores))
        return found
