"""Work that is done one piece at a time, beside everything else."""

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
    """A thread of its own for work that takes long or much memory, in the order in which it comes.

    Others do not wait for it, as they would if it took all threads of the event loop.
    """

    def __init__(self, name: str) -> None:
        """Start nothing yet."""
        self._pool = ThreadPoolExecutor(1, name)
        self._closed = Event()

    async def run(self, work: Callable[..., Result], *args: object) -> Result:
        """What `work(*args)` returns; a caller that is cancelled while it waits is forgotten.

        Raises:
            ApiError: the server ends.
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
        """Finish what is being done; who waits gets an error."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
