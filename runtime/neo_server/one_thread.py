"""Long work, one piece at a time, in a thread of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from neo_runtime.closable import Closable

from neo_server.errors import shutting_down

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneThread"]

Result = TypeVar("Result")


class OneThread(Closable):
    """A thread for work that takes much time or memory, done in the order in which it is submitted.

    In the event loop's own threads, such work could occupy all of them and delay everything else.
    """

    def __init__(self, name: str) -> None:
        """Create the executor; the thread starts with the first piece of work."""
        self._pool = ThreadPoolExecutor(1, name)
        self._closed = Event()

    async def run(self, work: Callable[..., Result], *args: object) -> Result:
        """Run `work(*args)` in the thread and return its result.

        If the caller is cancelled before the work has begun, the work is dropped.

        Raises:
            ApiError: (503) the server is shutting down.
        """
        if self._closed.is_set():
            raise shutting_down()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed.is_set() and not (task and task.cancelling()):
                raise shutting_down() from None
            raise

    def close(self) -> None:
        """Finish the current piece of work; callers whose work has not begun get an error."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
