"""A request as the scheduler sees it. Whatever a caller's functions raise ends this one alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.generation.text_stream import Piece
from neo_runtime.scheduling.pending import PendingCompletion

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from numpy.typing import NDArray

    from neo_runtime.backends.step_logits import RowLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cache.prefix_cache import CachedBeginning, PrefixCache
    from neo_runtime.generation.rows import Row

__all__ = ["Request"]

_LOG = logging.getLogger("neo_runtime")


class Request:
    """One row, who waits for it, and whether anybody still does."""

    def __init__(
        self, row: Row, should_stop: Callable[[], bool], group: Hashable | None = None
    ) -> None:
        """Hold the row's prefix until its prompt is read."""
        self.pending = PendingCompletion()
        self.group = group
        """What it shares the batch with others as; None: as itself alone."""
        self.has_ended = False
        self._unfinished: set[Request] = set()
        self.row = row
        self._should_stop = should_stop
        self._beginning: CachedBeginning | None = None
        self._chosen: Piece | BaseException = Piece("")
        self._holds_prefix = row.prefix is not None
        if row.prefix is not None:
            row.prefix.hold()

    def join(self, requests: set[Request]) -> None:
        """Be in a set until the end."""
        self._unfinished = requests
        requests.add(self)

    def begin(self) -> None:
        """Its prompt is about to be read."""
        self.pending.queue_seconds = self.row.watch.seconds()

    @property
    def unread_prompt(self) -> NDArray[np.int64]:
        """What of the prompt is still to be computed: int64 [n]."""
        if self._beginning is not None:
            return self.row.prompt[self._beginning.length :]
        return self.row.unread_prompt

    def look_up(self, prefixes: PrefixCache) -> None:
        """See what of the prompt a cache has; `fill` must come next, or this again."""
        if self.row.prefix is None:
            try:
                self._beginning = prefixes.find(self.row.prompt)
            except BaseException as error:
                self.fail(error)

    def repeats(self, other: Request) -> bool:
        """Whether it would compute what another is about to leave in the prefix cache."""
        if self._beginning is None or other._beginning is None:
            return False
        ahead = self._beginning.ahead
        return ahead is not None and ahead == other._beginning.ahead

    @property
    def prompt_length(self) -> int:
        """Tokens of the whole prompt."""
        return len(self.row.prompt)

    def fill(self, cache: KVCache, row: int) -> None:
        """Let an empty sequence begin with what is computed of the prompt already."""
        if self.row.prefix is not None:
            self.row.prefix.fill(cache, [row])
        if self._beginning is not None:
            self._beginning.load(cache, row)
            self.row.cached = self._beginning.length
        self._let_go()

    def keep(self, cache: KVCache, row: int) -> None:
        """Keep for other requests what a row has of this one. Nobody fails for a copy that does."""
        if self._beginning is None:
            return
        length = int(cache.store.lengths[row])
        if self._beginning.has_more(length):
            tokens = [choice.token for choice in self.row.choices]
            ids = np.concatenate([self.row.prompt, np.array(tokens, np.int64)])
            try:
                self._beginning.extend(ids[:length], cache, row)
            except Exception as error:
                _LOG.warning("a beginning was not kept for other requests: %s", error)

    def choose(self, logits: RowLogits) -> int:
        """Choose the next token, once all that was said is computed; how many were chosen.

        Nobody is told before `tell`.
        """
        before = len(self.row.choices)
        try:
            self._chosen = self.row.advance(logits)
        except BaseException as error:
            self._chosen = error
        return len(self.row.choices) - before

    def tell(self) -> None:
        """Give the reader what `choose` chose, or what went wrong there."""
        if isinstance(self._chosen, BaseException):
            self.fail(self._chosen)
            return
        if self.pending.time_to_first_token is None:
            self.pending.time_to_first_token = self.row.watch.seconds()
        self._give(self._chosen)
        if self.row.finish_reason is not None:
            self._complete()

    def end_if_unwanted(self, *, is_closing: bool) -> None:
        """End where nobody wants more, with the text so far."""
        if self.has_ended:
            return
        if self.pending.cancelled():
            self._resolve(lambda: None)
            return
        try:
            is_over = is_closing or bool(self._should_stop())  # which may raise as well
        except BaseException as error:
            self.fail(error)
            return
        if is_over:
            self._give(self.row.cancel())
            self._complete()

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        if isinstance(error, StopIteration):
            # It would end the loop of whoever reads, as if all were well (PEP 479).
            cause, error = error, RuntimeError("a function of the request raised StopIteration")
            error.__cause__ = cause
        if not self.has_ended:
            self._resolve(lambda: self.pending.set_exception(error))

    def _complete(self) -> None:
        completion = self.row.completion()
        self._resolve(lambda: self.pending.set_result(completion))

    def _resolve(self, settle: Callable[[], None]) -> None:
        """Readers first: callbacks of the future may read what is left, and may raise."""
        self.has_ended = True
        self._unfinished.discard(self)
        self._let_go()
        self.pending.give(None)
        try:
            if self.pending.set_running_or_notify_cancel():
                settle()
        except BaseException:
            _LOG.exception("a callback of a request failed")

    def _give(self, piece: Piece) -> None:
        if piece:
            self.pending.give(piece)

    def _let_go(self) -> None:
        if self._holds_prefix and self.row.prefix is not None:
            self._holds_prefix = False
            self.row.prefix.release()
