"""The answer to a request: whole, or as server-sent events while it is computed."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import StreamingResponse

from neo_server.answers import DONE, ChoiceWriter, event
from neo_server.errors import CLIENT_GONE, api_error, shutting_down

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.scheduling.pending import PendingCompletion
    from starlette.types import Receive, Scope, Send

    from neo_server.answers import Echo
    from neo_server.follow import Followed
    from neo_server.work import Work

__all__ = ["EventStream", "whole_answer"]

_Item = TypeVar("_Item")

_LOG = logging.getLogger("neo_server")
_LAST_SECONDS = 1.0
"""Seconds to send the last event of a stream that is cut off by shutdown."""


async def whole_answer(work: Work) -> bytes:
    """Wait for all choices, and return the JSON of the answer."""
    echoes = await work.echoes()
    completions = await asyncio.gather(*(asyncio.wrap_future(one) for one in work.pending))
    for completion in completions:
        work.finished(completion)
    return await asyncio.to_thread(_written, work, echoes, completions)


def _written(work: Work, echoes: Sequence[Echo | None], completions: Sequence[Completion]) -> bytes:
    """The JSON; made in a worker thread, as log probabilities of many tokens take a while."""
    asked = work.asked
    choices: list[dict[str, Any]] = []
    for index, echo in enumerate(echoes):
        of_prompt = completions[index * asked.best_of : (index + 1) * asked.best_of]
        nothing: list[Completion | None] = [None] * asked.n
        for chosen in _best(of_prompt, asked.n) or nothing:
            writer = ChoiceWriter(len(choices), asked, work.tokenizer)
            choices.append(writer.whole(echo, chosen))
    return json.dumps(work.frame.around(choices, usage=work.whole_usage())).encode()


def _best(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The `n` completions with the highest log probability per token, best first.

    With no more than `n`, all of them in their order.
    """
    if len(completions) <= n:
        return list(completions)
    return sorted(completions, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(completion: Completion) -> float:
    logprobs = [choice.logprob or 0.0 for choice in completion.logprobs or ()]
    return sum(logprobs) / max(len(logprobs), 1)


class EventStream(StreamingResponse):
    """Server-sent events. Ends the work even if the client disconnects before the first event."""

    def __init__(self, work: Work, request: Followed) -> None:
        """Send the results of `work`, and record the final status in `request`."""
        super().__init__(
            _events(work, request),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
        self._work, self._request = work, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the base class."""
        try:
            await super().__call__(scope, receive, send)
            if not self._work.is_told:
                self._request.status = CLIENT_GONE
        except asyncio.CancelledError:  # the server's time to shut down is over
            _LOG.warning("a stream was cut: the server is shutting down")
            error = shutting_down()
            self._request.status = error.status
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    last = event(error.body).encode()
                    await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._work.end()


async def _events(work: Work, request: Followed) -> AsyncGenerator[str]:
    asked, frame = work.asked, work.frame
    usage = {"usage": None} if asked.include_usage else {}
    try:
        echoes = await work.in_time(work.echoes())
        sequences = [
            _sequence(work, index * asked.n + copy, echo, one)
            for index, echo in enumerate(echoes)
            for copy, one in enumerate(work.of_prompt(index) or [None] * asked.n)
        ]
        async for choice in _merged(sequences, work):
            yield event(frame.around([choice], **usage))
        if asked.include_usage:
            yield event(frame.around([], usage=work.whole_usage()))
        work.is_told = True
        yield DONE
    except Exception as error:
        # The status line has been sent; clients recognize an error by this event.
        told = api_error(error)
        request.status, work.is_told = told.status, True
        yield event(told.body)


async def _sequence(
    work: Work, index: int, echo: Echo | None, pending: PendingCompletion | None
) -> AsyncGenerator[dict[str, Any]]:
    writer = ChoiceWriter(index, work.asked, work.tokenizer)
    if echo is not None:
        yield writer.begin(echo)
    if pending is None:
        yield writer.end(None)
        return
    async for piece in pending:
        yield writer.piece(piece)
    completion = pending.result()
    work.finished(completion)
    yield writer.end(completion)


async def _merged(sources: Sequence[AsyncIterator[_Item]], work: Work) -> AsyncGenerator[_Item]:
    """The items of several iterators, in order of arrival; an error of one ends all."""
    items: asyncio.Queue[_Item | Exception | None] = asyncio.Queue()

    async def read(source: AsyncIterator[_Item]) -> None:
        try:
            async for item in source:
                items.put_nowait(item)
        except Exception as error:
            items.put_nowait(error)
        else:
            items.put_nowait(None)

    tasks = [asyncio.create_task(read(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await work.in_time(items.get())
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
