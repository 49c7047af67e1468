"""What the process of a model answers, a peer's and ours alike.

    {"op": "load"}                        → seconds, versions, details
    {"op": "prefill", "ids": [[…], …]}    → seconds, tokens [batch]
    {"op": "decode", "n": 32}             → seconds [n], tokens [n][batch]
    {"op": "context", "length": 1024, "batch": 1, "seed": 0}   → seconds, tokens [batch]
    {"op": "memory"}                      → rss, rss_anon, pss (bytes)

Standard library only: a peer's worker runs in its own environment.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from neo_tools.worker.memory import memory_of
from neo_tools.worker.versions import versions_of

if TYPE_CHECKING:
    from neo_tools.worker.protocol import Handler

__all__ = ["CONTEXT_CHUNK", "Engine", "context_ids", "engine_handlers"]

CONTEXT_CHUNK = 256
"""Positions that `context` feeds at once, so that no engine needs memory for length squared."""

_MASK = (1 << 64) - 1


class Engine(Protocol):
    """A loaded model with one running cache."""

    def load(self) -> dict[str, Any]:
        """Load the model; returns details worth reporting (options in force)."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        ...

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions belong in a report."""
        ...

    def reset(self) -> None:
        """Forget the cache: the next `forward` starts new sequences."""
        ...

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Append equally long rows to the cache; returns each row's greedy next token."""
        ...


def context_ids(length: int, batch: int, seed: int, vocab_size: int) -> list[list[int]]:
    """Token ids that every engine gets alike: splitmix64 of (seed, row, position) mod vocabulary.

    Args:
        length: positions a row.
        batch: rows; each has its own ids.
        seed: any number.
        vocab_size: ids are below it.

    Returns:
        [batch][length] token ids.
    """
    return [
        [
            _splitmix64((seed << 40) ^ (row << 32) ^ position) % vocab_size
            for position in range(length)
        ]
        for row in range(batch)
    ]


def _splitmix64(value: int) -> int:
    """Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014)."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def engine_handlers(engine: Engine) -> dict[str, Handler]:
    """Who answers the requests above, for `protocol.serve`.

    A step's seconds run from token ids in to the next token known: the logits' way to the host
    and the greedy choice are part of it, for every engine alike.
    """
    session = _Session(engine)
    return {
        "load": session.load,
        "prefill": session.prefill,
        "decode": session.decode,
        "context": session.context,
        "memory": lambda request: memory_of(),
    }


class _Session:
    """The state between requests: whether a model is loaded, how deep the cache is."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loaded = False
        self.depth = 0
        self.last: list[int] = []

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds, versions, details."""
        started = time.perf_counter()
        details = self.engine.load()
        seconds = time.perf_counter() - started
        self.loaded = True
        return {
            "seconds": seconds,
            "versions": versions_of(self.engine.packages),
            "details": details,
        }

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds, and tokens [batch]; the prompt in one call."""
        self._require_load(request)
        return self._fill(request["ids"], chunk=None)

    def context(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds, and tokens [batch]; in pieces of `CONTEXT_CHUNK`."""
        self._require_load(request)
        length, batch, seed = request["length"], request["batch"], request["seed"]
        ids = context_ids(length, batch, seed, self.engine.vocab_size)
        return self._fill(ids, chunk=CONTEXT_CHUNK)

    def _fill(self, ids: list[list[int]], chunk: int | None) -> dict[str, Any]:
        length = len(ids[0]) if ids else 0
        if length == 0 or any(len(row) != length for row in ids):
            raise ValueError("prefill wants one or more rows of the same length, at least one id")
        self._check_room(0, length)
        self.last, self.depth = [], 0
        self.engine.reset()
        started = time.perf_counter()
        width = chunk or length
        for start in range(0, length, width):
            self.last = self.engine.forward([row[start : start + width] for row in ids])
        seconds = time.perf_counter() - started
        self.depth = length
        return {"seconds": seconds, "tokens": self.last}

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds [n], and tokens [n][batch]."""
        self._require_load(request)
        n = request["n"]
        if not self.last:
            raise ValueError("decode before prefill or context")
        self._check_room(self.depth, n)
        seconds, tokens = [], []
        for _ in range(n):
            started = time.perf_counter()
            self.last = self.engine.forward([[token] for token in self.last])
            seconds.append(time.perf_counter() - started)
            tokens.append(self.last)
            self.depth += 1
        return {"seconds": seconds, "tokens": tokens}

    def _require_load(self, request: dict[str, Any]) -> None:
        if not self.loaded:
            raise ValueError(f"{request['op']} before load")

    def _check_room(self, depth: int, more: int) -> None:
        if depth + more > self.engine.max_length:
            raise ValueError(f"{depth} + {more} positions; the model has {self.engine.max_length}")
