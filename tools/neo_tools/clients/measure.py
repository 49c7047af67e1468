"""Rounds of requests by several clients, and what each round took."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.base import position_bytes
from neo_runtime.scheduling.scheduler import Scheduler

from neo_tools.worker.engine import context_ids

if TYPE_CHECKING:
    from neo_runtime.model import Model

__all__ = ["HTTP", "PREFIXES", "WAYS", "Load", "Round", "measure"]

WAYS = ("one by one", "threads", "scheduler")
PREFIXES = "prefix cache"
"""One more way, where prompts share a beginning."""
HTTP = "neo-serve"
"""And one where it is asked for."""

_Call = Callable[[Sequence[int], int], float]
"""(token ids, new tokens) → seconds from the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the clients ask for."""

    clients: int
    requests: int
    """Of each client."""
    prompt: int
    """Tokens of each prompt."""
    new_tokens: int
    """On average: request r of a client asks for between half of it and one and a half."""
    shared: int = 0
    """Tokens at the beginning of all prompts of a round that are the same."""
    seed: int = 1

    def prompts(self, index: int, vocab_size: int) -> list[list[int]]:
        """Of one round, those of a client together; no other round has any of them."""
        found = context_ids(
            self.prompt, self.clients * self.requests, self.seed + index, vocab_size
        )
        return [[*found[0][: self.shared], *prompt[self.shared :]] for prompt in found]

    def new_tokens_of(self, client: int, request: int) -> int:
        """What one request asks for; requests of one time end at different times."""
        step = (client * 3 + request * 5) % 8  # every eighth of the range, about equally often
        return max(1, self.new_tokens // 2 + self.new_tokens * step // 7)

    @property
    def tokens(self) -> int:
        """New tokens of a round."""
        return sum(
            self.new_tokens_of(client, request)
            for client in range(self.clients)
            for request in range(self.requests)
        )

    def prefix_cache_bytes(self, model: Model) -> int:
        """Room for what the clients ask for at once."""
        return self.clients * self.length * position_bytes(model.manifest)

    @property
    def length(self) -> int:
        """Positions that the longest request needs."""
        return self.prompt + self.new_tokens // 2 + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class Round:
    """One way, one round."""

    seconds: float
    """From the first request to the last answer."""
    first_tokens: tuple[float, ...]
    """Of each request: seconds from asking to its first token."""
    answers: tuple[float, ...]
    """Of each request: seconds from asking to its end."""


def measure(
    model: Model,
    load: Load,
    repetitions: int,
    progress: Callable[[str], None],
    over_http: _Call | None = None,
) -> dict[str, list[Round]]:
    """Serve the clients in each of `WAYS`, in rounds, in an order that rotates.

    Args:
        model: loaded.
        load: what the clients ask for.
        repetitions: rounds, after one that does not count.
        progress: told what happens next.
        over_http: asks a running `neo-serve`, as the last way.
    """
    alone = threading.Lock()
    sizes: dict[str, Any] = {"max_batch_size": load.clients, "max_length": load.length}
    with ExitStack() as schedulers:
        scheduler = schedulers.enter_context(Scheduler(model, **sizes))

        def one_by_one(ids: Sequence[int], new: int) -> float:
            with alone:
                return threads(ids, new)

        def threads(ids: Sequence[int], new: int) -> float:
            found = model.generate(ids, max_new_tokens=new, ignore_eos=True)
            return found.timings.decode_seconds

        calls: dict[str, _Call] = dict(
            zip(WAYS, (one_by_one, threads, partial(_scheduled, scheduler)), strict=True)
        )
        if load.shared:
            room = load.prefix_cache_bytes(model)
            keeping = schedulers.enter_context(Scheduler(model, **sizes, prefix_cache_bytes=room))
            calls[PREFIXES] = partial(_scheduled, keeping)
        if over_http is not None:
            calls[HTTP] = over_http
        ways, vocab_size = list(calls), model.manifest.model.vocab_size
        small = replace(load, requests=1, new_tokens=2)
        for way in ways:
            progress(f"{way}: warming up")
            _round(calls[way], small, small.prompts(repetitions, vocab_size))
        found: dict[str, list[Round]] = {way: [] for way in ways}
        for index in range(repetitions):
            for place in range(len(ways)):
                way = ways[(index + place) % len(ways)]
                progress(f"{way}: round {index + 1}/{repetitions}")
                found[way].append(_round(calls[way], load, load.prompts(index, vocab_size)))
    return found


def _scheduled(scheduler: Scheduler, ids: Sequence[int], new: int) -> float:
    pending = scheduler.submit(ids, max_new_tokens=new, ignore_eos=True)
    return pending.result().timings.decode_seconds


def _round(call: _Call, load: Load, prompts: Sequence[Sequence[int]]) -> Round:
    firsts: list[float] = []
    answers: list[float] = []
    errors: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for request in range(load.requests):
                new = load.new_tokens_of(number, request)
                asked = perf_counter()
                decoding = call(prompts[number * load.requests + request], new)
                took = perf_counter() - asked
                firsts.append(took - decoding)
                answers.append(took)
        except BaseException as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(load.clients)]
    started = perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = perf_counter() - started
    if errors:
        raise errors[0]
    return Round(seconds=seconds, first_tokens=tuple(firsts), answers=tuple(answers))
