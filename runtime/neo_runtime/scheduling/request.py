"""A request in the scheduler. An exception from a caller's function ends only its own request."""

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
    """One row of the batch, the future of its caller, and whether the result is still wanted."""

    def __init__(
        self, row: Row, should_stop: Callable[[], bool], group: Hashable | None = None
    ) -> None:
        """Hold the row's prefix until it is copied to the cache."""
        self.pending = PendingCompletion()
        self.group = group
        """Requests of one group take turns as one client; None: the request is its own group."""
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
        """Add the request to a set, which it leaves when it ends."""
        self._unfinished = requests
        requests.add(self)

    def begin(self) -> None:
        """Record the start of prefill."""
        self.pending.queue_seconds = self.row.watch.seconds()

    @property
    def unread_prompt(self) -> NDArray[np.int64]:
        """The tokens of the prompt that are still to be computed: int64 [n]."""
        if self._beginning is not None:
            return self.row.prompt[self._beginning.length :]
        return self.row.unread_prompt

    def look_up(self, prefixes: PrefixCache) -> None:
        """Look up the prompt in the prefix cache. Before any other use of that cache, call `fill`.

        Call `look_up` again if `fill` does not follow: blocks that were found may be evicted.
        """
        if self.row.prefix is None:
            try:
                self._beginning = prefixes.find(self.row.prompt)
            except BaseException as error:
                self.fail(error)

    def repeats(self, other: Request) -> bool:
        """Whether its next block is the one that another is about to add to the prefix cache."""
        if self._beginning is None or other._beginning is None:
            return False
        ahead = self._beginning.ahead
        return ahead is not None and ahead == other._beginning.ahead

    @property
    def prompt_length(self) -> int:
        """Tokens of the whole prompt."""
        return len(self.row.prompt)

    def fill(self, cache: KVCache, row: int) -> None:
        """Copy the keys and values already computed for the prompt to an empty row of a cache."""
        if self.row.prefix is not None:
            self.row.prefix.fill(cache, [row])
        if self._beginning is not None:
            self._beginning.load(cache, row)
            self.row.cached = self._beginning.length
        self._let_go()

    def keep(self, cache: KVCache, row: int) -> None:
        """Copy new blocks of a row to the prefix cache. A failed copy is logged, not raised."""
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
        """Choose the next token, unless the model has still to compute earlier ones.

        The reader gets the result, or the error, only from `tell`.

        Returns:
            The number of tokens chosen: a grammar may force more than one.
        """
        before = len(self.row.choices)
        try:
            self._chosen = self.row.advance(logits)
        except BaseException as error:
            self._chosen = error
        return len(self.row.choices) - before

    def tell(self) -> None:
        """Give the reader the text, or the error, of the last `choose`."""
        if isinstance(self._chosen, BaseException):
            self.fail(self._chosen)
            return
        if self.pending.time_to_first_token is None:
            self.pending.time_to_first_token = self.row.watch.seconds()
        self._give(self._chosen)
        if self.row.finish_reason is not None:
            self._complete()

    def end_if_unwanted(self, *, is_closing: bool) -> None:
        """End the request if it was cancelled, `should_stop` says so or the scheduler is closing.

        Unless the future was cancelled, the result is the text so far.
        """
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
            # It would silently end the reader's loop (PEP 479).
            cause, error = error, RuntimeError("a function of the request raised StopIteration")
            error.__cause__ = cause
        if not self.has_ended:
            self._resolve(lambda: self.pending.set_exception(error))

    def _complete(self) -> None:
        completion = self.row.completion()
        self._resolve(lambda: self.pending.set_result(completion))

    def _resolve(self, settle: Callable[[], None]) -> None:
        """End iteration, then settle the future: its callbacks may iterate, and may raise."""
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
