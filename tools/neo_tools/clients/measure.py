"""Measures requests of concurrent clients, in rounds."""

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
"""A further method, if prompts share a beginning."""
HTTP = "neo-serve"
"""A further method, on request."""

_Call = Callable[[Sequence[int], int], float]
"""(token ids, number of new tokens) → seconds from the first new token to the last."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The requests of the clients."""

    clients: int
    requests: int
    """Requests of each client."""
    prompt: int
    """Tokens of each prompt."""
    new_tokens: int
    """Average new tokens of a request; single requests ask for 0.5 to 1.5 times as many."""
    shared: int = 0
    """Tokens at the beginning of the prompts that are the same in a round."""
    seed: int = 1

    def prompts(self, index: int, vocab_size: int) -> list[list[int]]:
        """The prompts of one round, those of a client adjacent; every round has others."""
        found = context_ids(
            self.prompt, self.clients * self.requests, self.seed + index, vocab_size
        )
        return [[*found[0][: self.shared], *prompt[self.shared :]] for prompt in found]

    def new_tokens_of(self, client: int, request: int) -> int:
        """New tokens of one request; they vary, so that concurrent requests do not end together."""
        step = (client * 3 + request * 5) % 8  # 8 values, spread over the range about evenly
        return max(1, self.new_tokens // 2 + self.new_tokens * step // 7)

    @property
    def tokens(self) -> int:
        """New tokens of all requests of a round."""
        return sum(
            self.new_tokens_of(client, request)
            for client in range(self.clients)
            for request in range(self.requests)
        )

    def prefix_cache_bytes(self, model: Model) -> int:
        """Size of a prefix cache that holds one longest request for each client."""
        return self.clients * self.length * position_bytes(model.manifest)

    @property
    def length(self) -> int:
        """Positions of the longest request: prompt and new tokens."""
        return self.prompt + self.new_tokens // 2 + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class Round:
    """Measurements of one method in one round."""

    seconds: float
    """Seconds from the first request to the last answer."""
    first_tokens: tuple[float, ...]
    """For each request, in any order: seconds from sending it to its first token."""
    answers: tuple[float, ...]
    """For each request, in the order of `first_tokens`: seconds from sending it to the end of its
    answer."""


def measure(
    model: Model,
    load: Load,
    repetitions: int,
    progress: Callable[[str], None],
    over_http: _Call | None = None,
) -> dict[str, list[Round]]:
    """Serve the clients with each method, in rounds; the order of the methods rotates.

    The methods are `WAYS`; `PREFIXES` if prompts share a beginning; and `HTTP` with `over_http`.

    Args:
        model: the model.
        load: the requests of the clients.
        repetitions: measured rounds, after a short warm-up of each method.
        progress: called with a line before each round of a method.
        over_http: sends a request to a running `neo-serve`.

    Returns:
        The rounds of each method, by name.
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
    measured: list[tuple[float, float]] = []
    errors: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for request in range(load.requests):
                new = load.new_tokens_of(number, request)
                asked = perf_counter()
                decoding = call(prompts[number * load.requests + request], new)
                took = perf_counter() - asked
                measured.append((took - decoding, took))
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
    firsts, answers = zip(*measured, strict=True)
    return Round(seconds=seconds, first_tokens=firsts, answers=answers)
