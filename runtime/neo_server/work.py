"""Who is let in, and one request while it is computed."""

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
    """For so many sequences at once."""

    def __init__(self, most: int, unfinished: Callable[[], int]) -> None:
        """Nobody is in.

        Args:
            most: sequences.
            unfinished: those that the scheduler still has.
        """
        self.most = most
        self.counting = Lock()
        """Held for moments: the event loop takes it."""
        self._let_in = 0
        """Sequences that have not ended."""
        self._unfinished = unfinished

    def enter(self, sequences: int) -> None:
        """Let them in, all or none.

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
        """They have ended."""
        with self.counting:
            self._let_in -= sequences

    @property
    def let_in(self) -> int:
        """Sequences that were let in and have not left."""
        with self.counting:
            return self._let_in

    @property
    def inside(self) -> int:
        """Sequences that are computed, wait, or are about to."""
        with self.counting:
            return self._now_inside

    @property
    def _now_inside(self) -> int:
        """Those that were let in; or, if these are more, those with what was cancelled just now."""
        return max(self._let_in, self._unfinished())


@dataclass(eq=False, kw_only=True)
class Work:
    """One request while it is computed; `end` must be called, however it ends."""

    asked: Asked
    frame: Frame
    room: Room
    metrics: Metrics
    tokenizer: Tokenizer
    scorer: PromptScorer | None
    """None before the service was started."""
    places: int
    """Sequences of it that are not among `pending`; each of those leaves by itself."""
    seconds: float | None
    """That it may take."""
    tells_cached: bool
    """Whether the usage says how many tokens a prefix cache had."""
    prompts: list[NDArray[np.int64]] = field(default_factory=list)
    pending: list[PendingCompletion] = field(default_factory=list)
    """`best_of` for each prompt, those of a prompt together; none where no token is asked for."""
    usage: Usage = field(default_factory=Usage)
    deadline: float | None = None
    """By the event loop's clock; None: it may take as long as it takes."""
    has_ended: bool = False
    is_told: bool = False
    """The answer, or what became of it, was written to its end."""

    def add(self, pending: PendingCompletion) -> None:
        """One more continuation; from a thread, beside which `end` may be called."""
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
        """Cancel what is still computed, and make room."""
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
            ApiError: it came.
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
        """In the thread that ended it."""
        if isinstance(pending, PendingCompletion):
            self.metrics.left(pending)

    def of_prompt(self, index: int) -> list[PendingCompletion]:
        """The continuations of one prompt."""
        best_of = self.asked.best_of
        return self.pending[index * best_of : (index + 1) * best_of]

    def finished(self, completion: Completion) -> None:
        """Count it."""
        self.usage.completion_tokens += len(completion.token_ids)

    def whole_usage(self) -> dict[str, Any]:
        """What was used, once all continuations are done; each prompt as its first one found it."""
        if self.tells_cached:
            first = [one.result() for one in self.pending[:: self.asked.best_of]]
            self.usage.cached_tokens = sum(one.timings.cached_prompt_tokens for one in first)
        return self.usage.json

    async def echoes(self) -> list[Echo | None]:
        """What stands before the continuations of each prompt."""
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
