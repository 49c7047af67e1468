"""What a peer's worker and its client say to each other: JSON lines over stdin and stdout.

Requests, one per line, answered in order:

    {"op": "load"}                        → seconds, versions, details
    {"op": "prefill", "ids": [[…], …]}    → seconds, tokens [batch]
    {"op": "decode", "n": 32}             → seconds [n], tokens [n][batch]
    {"op": "context", "length": 1024, "batch": 1, "seed": 0}   → seconds, tokens [batch]
    {"op": "memory"}                      → rss, rss_anon, pss (bytes)
    {"op": "quit"}

An answer has `"ok": true`, or `"ok": false` and `error`. Standard library only: a worker runs in
its peer's own environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CONTEXT_CHUNK",
    "Engine",
    "claim_stdout",
    "context_ids",
    "memory_of",
    "parse_arguments",
    "serve",
    "versions_of",
]

CONTEXT_CHUNK = 256
"""Positions that `context` feeds at once, so that no peer needs memory for length squared."""

_MASK = (1 << 64) - 1


class Engine(Protocol):
    """One peer: a loaded model with one running cache."""

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
    """Token ids that every peer gets alike: splitmix64 of (seed, row, position) mod vocabulary.

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


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process's memory as Linux counts them.

    Returns:
        rss (all resident), rss_anon (private: not backed by a file), pss (shared pages divided by
        the number of processes that map them).

    Raises:
        OSError: no such process, or no Linux /proc.
    """
    status = _kilobytes(Path(f"/proc/{pid}/status"), ("VmRSS", "RssAnon"))
    rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), ("Pss",))
    return {"rss": status["VmRSS"], "rss_anon": status["RssAnon"], "pss": rollup["Pss"]}


def _kilobytes(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    found = dict.fromkeys(names, 0)
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return found


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions, by distribution name; absent ones are left out."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def claim_stdout() -> TextIO:
    """Keep the real stdout for answers; send all that anyone else prints there to stderr.

    On the level of file descriptors, because native libraries print without asking Python. From now
    on Ctrl-C, which a terminal sends to workers too, ends this process without a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def parse_arguments(argv: Sequence[str], precisions: Sequence[str]) -> argparse.Namespace:
    """The command line that all workers share: `model` (Path), `precision`, `threads`."""
    parser = argparse.ArgumentParser(description="A peer's worker: JSON lines on stdin and stdout.")
    parser.add_argument("--model", type=Path, required=True, help="folder to load")
    parser.add_argument("--precision", choices=precisions, default=precisions[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="torch only: cpu, or cuda:0")
    return parser.parse_args(argv)


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until `quit` or the end of the input.

    A step's seconds run from token ids in to the next token known: the logits' way to the host
    and the greedy choice are part of it, for every peer alike.
    """
    session = _Session(engine)
    for line in requests:
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            answer: dict[str, Any] = {"ok": True, **session.answer(request)}
        except Exception as error:  # a worker outlives a request that fails
            answer = refusal(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if answer.get("bye"):
            return


def refusal(error: Exception) -> dict[str, Any]:
    """The answer to a request that failed; what was not expected leaves its traceback on stderr."""
    if type(error).__module__ == "neo_runtime.errors":  # by name: peers do not have that package
        return {"ok": False, "error": str(error)}
    traceback.print_exception(error, file=sys.stderr)
    return {"ok": False, "error": f"{type(error).__name__}: {error}"}


class _Session:
    """The state between requests: whether a model is loaded, how deep the cache is."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loaded = False
        self.depth = 0
        self.last: list[int] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request.get("op")
        if op == "quit":
            return {"bye": True}
        if op == "memory":
            return memory_of()
        if op == "load":
            return self._load()
        if op not in ("prefill", "decode", "context"):
            raise ValueError(f"unknown op {op!r}")
        if not self.loaded:
            raise ValueError(f"{op} before load")
        if op == "prefill":
            return self._prefill(request["ids"], chunk=None)
        if op == "decode":
            return self._decode(request["n"])
        length, batch, seed = request["length"], request["batch"], request["seed"]
        ids = context_ids(length, batch, seed, self.engine.vocab_size)
        return self._prefill(ids, chunk=CONTEXT_CHUNK)

    def _load(self) -> dict[str, Any]:
        started = time.perf_counter()
        details = self.engine.load()
        seconds = time.perf_counter() - started
        self.loaded = True
        return {
            "seconds": seconds,
            "versions": versions_of(self.engine.packages),
            "details": details,
        }

    def _prefill(self, ids: list[list[int]], chunk: int | None) -> dict[str, Any]:
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

    def _decode(self, n: int) -> dict[str, Any]:
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

    def _check_room(self, depth: int, more: int) -> None:
        if depth + more > self.engine.max_length:
            raise ValueError(f"{depth} + {more} positions; the model has {self.engine.max_length}")
