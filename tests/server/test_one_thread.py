"""What takes long is done one at a time, and the end of the server waits for none but the first."""

from __future__ import annotations

import asyncio
import threading

import pytest
from neo_server.errors import ApiError
from neo_server.one_thread import OneThread


def test_who_waits_at_the_end_gets_an_error() -> None:
    began, may_end = threading.Event(), threading.Event()

    def slow() -> str:
        began.set()
        assert may_end.wait(60)
        return "done"

    async def run() -> None:
        thread = OneThread("tested")
        first, second = (asyncio.create_task(thread.run(slow)) for _ in range(2))
        third = asyncio.create_task(thread.run(slow))
        assert await asyncio.to_thread(began.wait, 60)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        closing = asyncio.create_task(asyncio.to_thread(thread.close))
        with pytest.raises(ApiError, match="shutting down") as error:
            await second
        assert error.value.status == 503
        may_end.set()
        assert await first == "done"
        await closing
        with pytest.raises(ApiError, match="shutting down"):
            await thread.run(slow)

    asyncio.run(run())
