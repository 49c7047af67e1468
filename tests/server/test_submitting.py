"""A request that ends while its continuations are being submitted leaves none behind."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from neo_runtime import Scheduler
from neo_server.asked import read_request
from neo_server.follow import Followed
from neo_server.limits import Limits
from neo_server.service import Service
from neo_server.streaming import EventStream

if TYPE_CHECKING:
    from neo_runtime.model import Model
    from neo_runtime.scheduling.pending import PendingCompletion


@pytest.mark.parametrize("when", [1, 3, 5])
def test_one_that_is_cancelled_meanwhile(
    model: Model, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    submitted: list[PendingCompletion] = []
    submit = Scheduler.submit

    with Service(model, "m", Limits(max_batch_size=2)) as service:
        service.start()

        async def run() -> None:
            loop, waiting = asyncio.get_running_loop(), asyncio.Event()

            def slow(self: Scheduler, *arguments: Any, **options: Any) -> PendingCompletion:
                one = submit(self, *arguments, **options)
                submitted.append(one)
                if len(submitted) == when:
                    loop.call_soon_threadsafe(waiting.set)
                    while not work.has_ended:
                        pass
                return one

            monkeypatch.setattr(Scheduler, "submit", slow)
            asked = read_request({"prompt": "a", "n": 5, "max_tokens": 400, "ignore_eos": True})
            work = service.open(asked, Followed(id="a", method="POST", path="/", client="-"))
            begun = asyncio.create_task(service.begin(work))
            await waiting.wait()
            begun.cancel()
            with pytest.raises(asyncio.CancelledError):
                await begun
            work.end()

        asyncio.run(run())  # waits for its threads
        assert len(submitted) == when
        assert all(one.cancelled() for one in submitted)
        assert f'{{finish_reason="cancelled"}} {when}.0' in service.metrics.text().decode()
        while service.room.inside:
            time.sleep(0.01)  # the scheduler drops them before its next step
        assert service.room.let_in == 0


def test_a_stream_that_the_server_cancels_says_why(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[dict[str, Any]] = []
    request = Followed(id="a", method="POST", path="/", client="-")

    async def run(service: Service) -> None:
        begun, never = asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body"):
                begun.set()

        async def receive() -> Any:
            await never.wait()

        fields = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
        work = service.open(read_request(fields), request)
        await service.begin(work)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        answer = asyncio.create_task(EventStream(work, request)(scope, receive, send))
        await asyncio.wait_for(begun.wait(), 60)
        answer.cancel()
        await answer
        assert work.has_ended

    with Service(model, "m", Limits(max_batch_size=1)) as service:
        service.start()
        asyncio.run(run(service))
    assert b'"the server is shutting down; try again"' in sent[-1]["body"]
    assert sent[-1]["more_body"] is False
    assert request.status == 503
    assert "a stream was cut: the server is shutting down" in caplog.text


def test_forms_are_not_compiled_behind_the_end(model: Model) -> None:
    def compiling() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("neo-forms")]

    with Service(model, "m", Limits(max_batch_size=1)) as service:
        service.start()
        fields = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": "a"}}

        async def run() -> None:
            asked = read_request(fields)
            work = service.open(asked, Followed(id="a", method="POST", path="/", client="-"))
            await service.begin(work)
            work.end()

        asyncio.run(run())
        assert compiling()
    assert not compiling()
