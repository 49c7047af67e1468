"""Talk to a model's process, which answers as `engine` says."""

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
    """Imports of its libraries included, start of the interpreter not."""
    versions: dict[str, str]
    details: dict[str, Any]
    """Options in force, as the worker found them."""


@dataclass(frozen=True, kw_only=True)
class PrefillResult:
    """A cache that holds a prompt."""

    seconds: float
    """From token ids to the next token known."""
    tokens: list[int]
    """[batch]: each row's greedy next token."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Greedy steps."""

    seconds: list[float]
    """[n], one per step, whatever the batch."""
    tokens: list[list[int]]
    """[n][batch]: what each step found; the first follows the prefill's."""


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Bytes of the worker's process."""

    rss: int
    """All resident."""
    rss_anon: int
    """Private: not backed by a file."""
    pss: int
    """Pages shared with other processes divided among them."""


class EngineWorker(Worker):
    """A process that holds a model and one running cache.

    Each method raises what `Worker.ask` raises.
    """

    def load(self) -> LoadResult:
        """Load the model; everything else needs it."""
        answer = self.ask("load")
        return LoadResult(
            seconds=answer["seconds"], versions=answer["versions"], details=answer["details"]
        )

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> PrefillResult:
        """Start over with a prompt (or a batch of equally long ones), in one call to the model."""
        rows = [list(row) if isinstance(row, Sequence) else [row] for row in ids]
        if ids and not isinstance(ids[0], Sequence):
            rows = [[token for row in rows for token in row]]
        answer = self.ask("prefill", ids=rows)
        return PrefillResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def decode(self, n: int) -> DecodeResult:
        """Greedy steps after the last prefill, context or decode."""
        answer = self.ask("decode", n=n)
        return DecodeResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def context(self, length: int, *, batch: int = 1, seed: int = 0) -> PrefillResult:
        """Fill the cache to a depth with `engine.context_ids`, in pieces of 256."""
        answer = self.ask("context", length=length, batch=batch, seed=seed)
        return PrefillResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def memory(self) -> MemoryResult:
        """What the worker's process holds now."""
        answer = self.ask("memory")
        return MemoryResult(rss=answer["rss"], rss_anon=answer["rss_anon"], pss=answer["pss"])
