"""Client of a model's worker, whose requests `engine` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neo_tools.worker.client import Worker

__all__ = ["DecodeResult", "EngineWorker", "LoadResult", "MemoryResult", "PrefillResult"]


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """A loaded model."""

    seconds: float
    """Includes the import of its libraries, but not the start of the interpreter."""
    versions: dict[str, str]
    details: dict[str, Any]
    """Options in effect, as reported by the worker."""


@dataclass(frozen=True, kw_only=True)
class PrefillResult:
    """A prompt processed into the cache."""

    seconds: float
    """From the token ids to the next token."""
    tokens: list[int]
    """[batch]: each row's greedy next token."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Greedy steps."""

    seconds: list[float]
    """[n]: one per step of the whole batch."""
    tokens: list[list[int]]
    """[n][batch]: the token that each step chose; the first follows that of the prefill."""


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Memory of the worker's process, in bytes."""

    rss: int
    """All resident memory."""
    rss_anon: int
    """Anonymous memory: resident and not backed by a file."""
    pss: int
    """Proportional share: shared pages are divided among the processes that map them."""


class EngineWorker(Worker):
    """A worker with a model and one cache.

    Errors of its methods are those of `Worker.ask`.
    """

    def load(self) -> LoadResult:
        """Load the model; other requests except `memory` need it."""
        answer = self.ask("load")
        return LoadResult(
            seconds=answer["seconds"], versions=answer["versions"], details=answer["details"]
        )

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> PrefillResult:
        """Start over with a prompt, or a batch of equally long ones, in one call of the model."""
        rows = [list(row) if isinstance(row, Sequence) else [row] for row in ids]
        if ids and not isinstance(ids[0], Sequence):
            rows = [[token for row in rows for token in row]]
        answer = self.ask("prefill", ids=rows)
        return PrefillResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def decode(self, n: int) -> DecodeResult:
        """Run `n` greedy steps after the last prefill, context or decode."""
        answer = self.ask("decode", n=n)
        return DecodeResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def context(self, length: int, *, batch: int = 1, seed: int = 0) -> PrefillResult:
        """Start over with `length` tokens of `engine.context_ids`, in chunks of `CONTEXT_CHUNK`."""
        answer = self.ask("context", length=length, batch=batch, seed=seed)
        return PrefillResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def memory(self) -> MemoryResult:
        """The current memory of the worker's process."""
        answer = self.ask("memory")
        return MemoryResult(rss=answer["rss"], rss_anon=answer["rss_anon"], pss=answer["pss"])
