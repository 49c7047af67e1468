"""The answer to a request that was begun: whole, or as events while it is computed."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import StreamingResponse

from neo_server.answers import DONE, ChoiceWriter, event
from neo_server.errors import api_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.scheduling.pending import PendingCompletion
    from starlette.types import Message, Receive, Scope, Send

    from neo_server.answers import Echo
    from neo_server.work import Work

__all__ = ["EventStream", "whole_answer"]

_Item = TypeVar("_Item")

_LOG = logging.getLogger("neo_server")
_WRITE_SECONDS = 60.0
"""That a client may leave an event unread."""


async def whole_answer(work: Work) -> bytes:
    """Wait for all choices; the answer's JSON."""
    echoes = await work.echoes()
    completions = await asyncio.gather(*(asyncio.wrap_future(one) for one in work.pending))
    for completion in completions:
        work.finished(completion)
    return await asyncio.to_thread(_written, work, echoes, completions)


def _written(work: Work, echoes: Sequence[Echo | None], completions: Sequence[Completion]) -> bytes:
    """In another thread, as log probabilities of many tokens take a while to write."""
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
    """Those with the highest log probability per token first, where some are left out."""
    if len(completions) <= n:
        return list(completions)
    return sorted(completions, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(completion: Completion) -> float:
    logprobs = [choice.logprob or 0.0 for choice in completion.logprobs or ()]
    return sum(logprobs) / max(len(logprobs), 1)


class EventStream(StreamingResponse):
    """Server-sent events; ends the work also where the client goes before the first of them."""

    def __init__(self, work: Work) -> None:
        """Send what `work` computes."""
        super().__init__(
            _events(work), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the base class."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(_WRITE_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            _LOG.warning("a client that does not read its stream was dropped")
        except asyncio.CancelledError:  # when the server's patience is at its end
            _LOG.warning("a stream was cut: the server is shutting down")
        finally:
            self._work.end()


async def _events(work: Work) -> AsyncGenerator[str]:
    asked, frame = work.asked, work.frame
    usage = {"usage": None} if asked.include_usage else {}
    try:
        echoes = await work.echoes()
        sequences = [
            _sequence(work, index * asked.n + copy, echo, one)
            for index, echo in enumerate(echoes)
            for copy, one in enumerate(work.of_prompt(index) or [None] * asked.n)
        ]
        async for choice in _merged(sequences):
            yield event(frame.around([choice], **usage))
        if asked.include_usage:
            yield event(frame.around([], usage=work.whole_usage()))
        yield DONE
    except Exception as error:
        # The status has been sent; clients take this as an error.
        yield event(api_error(error).body)


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


async def _merged(sources: Sequence[AsyncIterator[_Item]]) -> AsyncGenerator[_Item]:
    """The items of several iterators, as they come; an error of one ends all."""
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
            item = await items.get()
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
