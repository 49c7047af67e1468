"""The result of `Scheduler.submit`: a future that also streams its text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError
from neo_runtime.generation.completion import Completion
from neo_runtime.generation.text_stream import Piece

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Self

__all__ = ["PendingCompletion"]


class PendingCompletion(Future[Completion], Iterator[Piece]):
    """A completion that is being computed.

    As a `concurrent.futures.Future` it has `result(timeout)`, `exception`, `done`, `cancel` and
    `add_done_callback`; `await asyncio.wrap_future(pending)` waits for it in a coroutine. Iterating
    over it, with `for` or `async for`, yields the text as it is generated, in pieces of valid
    UTF-8. Only one reader may iterate. If the request failed, the error is raised after the last
    piece.

    `cancel` may be called at any time before the end: the sequence leaves the batch before its next
    token, and `result` raises `CancelledError`. To keep the text so far, use `should_stop` instead.
    An `async for` that is left early, by an error or a cancelled task, cancels the request. For a
    plain `for`, the block `with scheduler.submit(…) as pending:` does so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue_seconds: float | None = None
        """Seconds from `submit` to the start of prefill; None before that."""
        self.time_to_first_token: float | None = None
        """Seconds from `submit` to the first token; None until there is one."""
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._wake: Callable[[], object] | None = None
        self._worker: int | None = None
        self._process = os.getpid()

    def computed_by(self, worker: int | None) -> None:
        """For the scheduler: set the id of its thread, which must not wait for this result."""
        self._worker = worker

    def give(self, piece: Piece | None) -> None:
        """For the scheduler: add a piece of text; None marks the end."""
        self._pieces.put(piece)
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed
                self._wake = None

    def cancel(self) -> bool:
        """See `Future.cancel`; iteration ends at once."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self.give(None)
        return is_cancelled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the request; this has no effect once it has ended."""
        self.cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """See `Future.result`."""
        self._refuse_deadlock()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `Future.exception`."""
        self._refuse_deadlock()
        return super().exception(timeout)

    def __next__(self) -> Piece:
        try:
            piece = self._pieces.get(block=False)
        except Empty:
            self._refuse_deadlock()
            piece = self._pieces.get()
        if piece is None:
            self._end()
            raise StopIteration
        return piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces without blocking a thread."""
        import asyncio

        self._refuse_deadlock()
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(news.set)
        try:
            while True:
                news.clear()
                try:
                    piece = self._pieces.get(block=False)
                except Empty:
                    await news.wait()
                    continue
                if piece is None:
                    break
                yield piece
            self._end()
        finally:
            self._wake = None
            self.cancel()  # no effect once it has ended

    def _end(self) -> None:
        """After the last piece: raise the error that ended the request, if any."""
        self._pieces.put(None)  # so that further calls of `next` end as well
        self.result()

    def _refuse_deadlock(self) -> None:
        """Raise an error if waiting would never end."""
        if os.getpid() != self._process and not self.done():
            raise NeoError(
                "the request was submitted in another process, whose scheduler computes it; wait "
                "for it there, or make a scheduler in each process"
            )
        if get_ident() == self._worker and not self.done():
            raise NeoError(
                "a callback in the scheduler's thread waits for a request that this thread has to "
                "compute; wait in another thread"
            )
