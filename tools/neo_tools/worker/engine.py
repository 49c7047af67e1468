"""Requests to the worker of a model, whether a peer's or ours, and their answers.

    {"op": "load"}                        → seconds, versions, details
    {"op": "prefill", "ids": [[…], …]}    → seconds, tokens [batch]
    {"op": "decode", "n": 32}             → seconds [n], tokens [n][batch]
    {"op": "context", "length": 1024, "batch": 1, "seed": 0}   → seconds, tokens [batch]
    {"op": "memory"}                      → rss, rss_anon, pss (bytes)

Only the standard library is used: a peer's worker runs in an environment of its own.
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
"""Tokens that `context` feeds at once, so that no engine needs memory for [length, length]."""

_MASK = (1 << 64) - 1


class Engine(Protocol):
    """A loaded model with one running cache."""

    def load(self) -> dict[str, Any]:
        """Load the model; returns details for reports, such as the options in effect."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        ...

    @property
    def max_length(self) -> int:
        """Context length of the model, in tokens."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions are reported."""
        ...

    def reset(self) -> None:
        """Empty the cache: the next `forward` starts new sequences."""
        ...

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Process rows of token ids of equal length, after those in the cache.

        Returns:
            The greedy next token of each row.
        """
        ...


def context_ids(length: int, batch: int, seed: int, vocab_size: int) -> list[list[int]]:
    """Pseudorandom token ids, the same for every engine.

    An id is splitmix64 of (seed, row, position), modulo the vocabulary size.

    Args:
        length: tokens per row.
        batch: number of rows; their ids differ.
        seed: an integer of at least 0.
        vocab_size: upper bound of the ids, exclusive.

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
    """Handlers of the requests above, for `protocol.serve`.

    For every engine, the seconds of a step include the copy of the logits to the host and the
    greedy choice of the next token.
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
    """The state between requests: whether the model is loaded, and the tokens in the cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loaded = False
        self.depth = 0
        self.last: list[int] = []

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load the model; answers seconds, versions and details."""
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
        """Process a prompt in one call; answers seconds and tokens [batch]."""
        self._require_load(request)
        return self._fill(request["ids"], chunk=None)

    def context(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fill the cache in chunks of `CONTEXT_CHUNK`; answers seconds and tokens [batch]."""
        self._require_load(request)
        length, batch, seed = request["length"], request["batch"], request["seed"]
        ids = context_ids(length, batch, seed, self.engine.vocab_size)
        return self._fill(ids, chunk=CONTEXT_CHUNK)

    def _fill(self, ids: list[list[int]], chunk: int | None) -> dict[str, Any]:
        length = len(ids[0]) if ids else 0
        if length == 0 or any(len(row) != length for row in ids):
            raise ValueError(
                "prefill needs rows of the same length, at least one with at least one id"
            )
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
        """Run n greedy steps; answers seconds [n] and tokens [n][batch]."""
        self._require_load(request)
        n = request["n"]
        if not self.last:
            raise ValueError("decode before prefill or context; send one of them first")
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
            raise ValueError(f"{request['op']} before load; send load first")

    def _check_room(self, depth: int, more: int) -> None:
        if depth + more > self.engine.max_length:
            raise ValueError(f"{depth} + {more} positions; the model has {self.engine.max_length}")
