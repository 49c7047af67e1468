"""Rounds of requests by several clients, and what each round took."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from neo_runtime.scheduling.scheduler import Scheduler

from neo_tools.peers.worker_protocol import context_ids

if TYPE_CHECKING:
    from neo_runtime.model import Model

__all__ = ["HTTP", "WAYS", "Load", "Round", "measure"]

WAYS = ("one by one", "threads", "scheduler")
HTTP = "neo-serve"
"""One more way, where it is asked for."""

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
    seed: int = 1

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
    with Scheduler(model, max_batch_size=load.clients, max_length=load.length) as scheduler:

        def one_by_one(ids: Sequence[int], new: int) -> float:
            with alone:
                return threads(ids, new)

        def threads(ids: Sequence[int], new: int) -> float:
            found = model.generate(ids, max_new_tokens=new, ignore_eos=True)
            return found.timings.decode_seconds

        def scheduled(ids: Sequence[int], new: int) -> float:
            pending = scheduler.submit(ids, max_new_tokens=new, ignore_eos=True)
            return pending.result().timings.decode_seconds

        calls: dict[str, _Call] = dict(zip(WAYS, (one_by_one, threads, scheduled), strict=True))
        if over_http is not None:
            calls[HTTP] = over_http
        ways = list(calls)
        small = Load(clients=load.clients, requests=1, prompt=load.prompt, new_tokens=2)
        for way in ways:
            progress(f"{way}: warming up")
            _round(calls[way], small, model.manifest.model.vocab_size)
        found: dict[str, list[Round]] = {way: [] for way in ways}
        for index in range(repetitions):
            for place in range(len(ways)):
                way = ways[(index + place) % len(ways)]
                progress(f"{way}: round {index + 1}/{repetitions}")
                found[way].append(_round(calls[way], load, model.manifest.model.vocab_size))
    return found


def _round(call: _Call, load: Load, vocab_size: int) -> Round:
    prompts = context_ids(load.prompt, load.clients * load.requests, load.seed, vocab_size)
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
