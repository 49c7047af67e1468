"""One request of a `Scheduler`, seen from both sides: a future, and its text as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError
from neo_runtime.generation.completion import Completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.backends.step_logits import RowLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.generation.rows import Row

__all__ = ["PendingCompletion"]


class PendingCompletion(Future[Completion], Iterator[str]):
    """A completion that is being computed, returned by `Scheduler.submit`.

    As a `concurrent.futures.Future` it has `result(timeout)`, `exception`, `done`, `cancel` and
    `add_done_callback`; `await asyncio.wrap_future(pending)` waits for it in a coroutine. Iterated,
    it gives the text in pieces of valid UTF-8 as they come, for one reader.

    `cancel` may be called at any time before the end: the sequence leaves the batch before its next
    token, and `result` raises `CancelledError`. For the text so far use `should_stop` instead.
    """

    def __init__(
        self, row: Row, should_stop: Callable[[], bool], on_piece: Callable[[str], object] | None
    ) -> None:
        super().__init__()
        self._row = row
        self._should_stop = should_stop
        self._on_piece = on_piece
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._has_ended = False

    def __next__(self) -> str:
        piece = self._pieces.get()
        if piece is not None:
            return piece
        self._pieces.put(None)  # for those who ask again
        if not self.cancelled():
            self.result()  # raises what ended it
        raise StopIteration

    @property
    def row(self) -> Row:
        """For the scheduler: what is generated."""
        return self._row

    @property
    def has_ended(self) -> bool:
        """For the scheduler: whether there is nothing more to compute."""
        return self._has_ended

    def fill(self, cache: KVCache, row: int) -> None:
        """For the scheduler: begin with the prefix. Where that is closed, this request ends."""
        if self._row.prefix is not None:
            try:
                self._row.prefix.fill(cache, row)
            except NeoError as error:
                self.fail(error)

    def push(self, logits: RowLogits) -> None:
        """For the scheduler: choose the next token. What fails ends this request alone."""
        try:
            self._give(self._row.push(self._row.sampler.pick(logits)))
            if self._row.finish_reason is not None:
                self._complete()
        except Exception as error:
            self.fail(error)

    def end_if_unwanted(self, *, is_closing: bool) -> None:
        """For the scheduler: end where nobody wants more, with the text so far."""
        try:
            if self._has_ended:
                return
            if self.cancelled():
                self._complete()
            elif is_closing or self._should_stop():
                self._give(self._row.cancel())
                self._complete()
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """For the scheduler: end with an error."""
        if not self._has_ended:
            self._has_ended = True
            if self.set_running_or_notify_cancel():
                self.set_exception(error)
            self._pieces.put(None)

    def _complete(self) -> None:
        self._has_ended = True
        if self.set_running_or_notify_cancel():
            self.set_result(self._row.completion())
        self._pieces.put(None)

    def _give(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)
            if self._on_piece is not None:
                self._on_piece(piece)
