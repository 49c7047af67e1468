"""Rounds of requests by several clients, and what each round took."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from neo_runtime.scheduling.scheduler import Scheduler

from neo_tools.peers.worker_protocol import context_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.model import Model

__all__ = ["WAYS", "Load", "Round", "measure"]

WAYS = ("one by one", "threads", "scheduler")


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
    model: Model, load: Load, repetitions: int, progress: Callable[[str], None]
) -> dict[str, list[Round]]:
    """Serve the clients in each of `WAYS`, in rounds, in an order that rotates.

    Args:
        model: loaded.
        load: what the clients ask for.
        repetitions: rounds, after one that does not count.
        progress: told what happens next.
    """
    alone = threading.Lock()
    with Scheduler(model, max_batch_size=load.clients, max_length=load.length) as scheduler:

        def one_by_one(ids: Sequence[int], new: int) -> Completion:
            with alone:
                return model.generate(ids, max_new_tokens=new, ignore_eos=True)

        def threads(ids: Sequence[int], new: int) -> Completion:
            return model.generate(ids, max_new_tokens=new, ignore_eos=True)

        def scheduled(ids: Sequence[int], new: int) -> Completion:
            return scheduler.submit(ids, max_new_tokens=new, ignore_eos=True).result()

        calls = dict(zip(WAYS, (one_by_one, threads, scheduled), strict=True))
        small = Load(clients=load.clients, requests=1, prompt=load.prompt, new_tokens=2)
        for way in WAYS:
            progress(f"{way}: warming up")
            _round(calls[way], small, model.manifest.model.vocab_size)
        found: dict[str, list[Round]] = {way: [] for way in WAYS}
        for index in range(repetitions):
            for place in range(len(WAYS)):
                way = WAYS[(index + place) % len(WAYS)]
                progress(f"{way}: round {index + 1}/{repetitions}")
                found[way].append(_round(calls[way], load, model.manifest.model.vocab_size))
    return found


def _round(call: Callable[[Sequence[int], int], Completion], load: Load, vocab_size: int) -> Round:
    prompts = context_ids(load.prompt, load.clients * load.requests, load.seed, vocab_size)
    firsts: list[float] = []
    answers: list[float] = []
    errors: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for request in range(load.requests):
                new = load.new_tokens_of(number, request)
                asked = perf_counter()
                completion = call(prompts[number * load.requests + request], new)
                took = perf_counter() - asked
                firsts.append(took - completion.timings.decode_seconds)
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
