"""What a step finds out: figures, each with its limit and the command that made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from neo_tools.peers.measure import Measured

__all__ = ["PRIVATE_LIMIT", "Figure", "StepResult", "cost", "gigabytes"]

PRIVATE_LIMIT = 2e9
"""Bytes of RssAnon that an export may have."""

Value = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value."""

    name: str
    value: Value
    unit: str = ""
    limit: Value | None = None
    """None: reported, not judged."""
    relation: Literal["≤", "≥", "="] = "≤"
    """How `value` must stand to `limit`."""
    command: str
    """A shell command that measures it again."""
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None where there is no limit. NaN is never within one."""
        if self.limit is None:
            return None
        if self.relation == "=":
            return self.value == self.limit
        value, limit = float(self.value), float(self.limit)
        return value <= limit if self.relation == "≤" else value >= limit


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step, done, skipped or broken."""

    name: str
    summary: str
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    skipped: str = ""
    """Why it did not run."""
    error: str = ""
    """Why it broke off."""

    @property
    def verdict(self) -> Literal["passed", "failed", "skipped", "error"]:
        """The worst of its figures."""
        if self.error:
            return "error"
        if self.skipped:
            return "skipped"
        return "failed" if any(f.passed is False for f in self.figures) else "passed"


def cost(
    measured: Measured, command: str, *, of: str = "", private_limit: float | None = None
) -> list[Figure]:
    """Time and memory of a program that ran; `of` goes in front of the names."""
    limit = None if private_limit is None else private_limit / 1e9
    return [
        Figure(name=f"{of}wall clock", value=measured.seconds, unit="s", command=command),
        gigabytes(f"{of}peak memory, resident", measured.peak_rss, command),
        Figure(
            name=f"{of}peak memory, private (RssAnon)",
            value=measured.peak_rss_anon / 1e9,
            unit="GB",
            limit=limit,
            command=command,
        ),
    ]


def gigabytes(name: str, count: int, command: str) -> Figure:
    """Bytes, reported in units of 1e9."""
    return Figure(name=name, value=count / 1e9, unit="GB", command=command)
