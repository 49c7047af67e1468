"""Performance targets for an H100, and their comparison with a run of `neo-bench`.

The numbers in this module are targets, not results. Each verdict is computed from the rows and
limits of `neo-bench`; if the run lacks the figure, the verdict is "not measured".
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_tools.bench.results import Results, Row

__all__ = ["LONG_PROMPT", "MANY", "SHORT", "Verdict", "judge"]

SHORT, LONG_PROMPT, MANY = 128, 1024, 32
"""Positions in the cache, tokens of the long prompt, and the large batch that the targets name."""
_EAGER = "torch:fp16"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One target, and how a run compares with it."""

    name: str
    wanted: str
    measured: str
    verdict: Literal["met", "not met", "not measured"]


def judge(results: Results, half: str, int4: str | None) -> list[Verdict]:
    """Compare a run with the targets for the 1.3B shape on an H100.

    Args:
        results: results of one run.
        half: label of the float16 bundle.
        int4: label of the int4 bundle; None if it was not run.
    """
    decode = _row(results.rows, half, depth=SHORT, batch=1)
    return [
        _share(decode),
        _ratio(results, half),
        _int4(results, half, int4),
        _prompt(_row(results.rows, half, prompt=LONG_PROMPT, batch=1)),
        _batch(decode, _row(results.rows, half, depth=SHORT, batch=MANY)),
        _memory(results, half, decode),
    ]


def _row(
    rows: Sequence[Row], label: str, *, batch: int, depth: int = 0, prompt: int = 0
) -> Row | None:
    found = [
        row
        for row in rows
        if (row.label, row.batch, row.depth, row.prompt) == (label, batch, depth, prompt)
    ]
    return found[0] if found else None


def _verdict(
    name: str, wanted: str, value: float | None, shown: str, met: Callable[[float], bool]
) -> Verdict:
    """The verdict on a figure.

    Args:
        name: what was measured.
        wanted: the target, in words.
        value: the figure; None if it was not measured.
        shown: format string of the figure, for `str.format`.
        met: whether a figure meets the target.
    """
    if value is None:
        return Verdict(name=name, wanted=wanted, measured="-", verdict="not measured")
    verdict: Literal["met", "not met"] = "met" if met(value) else "not met"
    return Verdict(name=name, wanted=wanted, measured=shown.format(value), verdict=verdict)


def _share(row: Row | None) -> Verdict:
    share = row.limit_share if row else None
    name, wanted = "float16 decode, share of the copy bandwidth", "at least 75 %"
    percent = None if share is None else 100 * share
    return _verdict(name, wanted, percent, "{:.0f} %", lambda value: value >= 75)


def _decode_ratio(results: Results, other: str, bundle: str | None) -> float | None:
    """Median over rounds of the decode speed ratio at batch 1; None if it was not measured."""
    found = [
        ratio.spread.median
        for ratio in results.ratios
        if (ratio.other, ratio.bundle, ratio.batch) == (other, bundle, 1)
        and ratio.test.startswith("tg")
    ]
    return found[0] if found else None


def _ratio(results: Results, half: str) -> Verdict:
    value = _decode_ratio(results, _EAGER, half)
    name, wanted = "float16 decode against PyTorch eager float16", "at least 3 times"
    return _verdict(name, wanted, value, "{:.2f} times", lambda value: value >= 3)


def _int4(results: Results, half: str, int4: str | None) -> Verdict:
    value = _decode_ratio(results, half, int4)
    name, wanted = "int4 decode against float16", "at least 1.8 times"
    return _verdict(name, wanted, value, "{:.2f} times", lambda value: value >= 1.8)


def _prompt(row: Row | None) -> Verdict:
    milliseconds = 1000 * median(row.round_seconds) if row else None
    name, wanted = f"prefill of {LONG_PROMPT} tokens", "at most 10 ms"
    return _verdict(name, wanted, milliseconds, "{:.1f} ms", lambda value: value <= 10)


def _batch(one: Row | None, many: Row | None) -> Verdict:
    value = None
    if one is not None and many is not None:
        value = many.tokens_per_second.median / one.tokens_per_second.median
    name, wanted = f"batch {MANY} decode against batch 1, tokens per second", "at least 15 times"
    return _verdict(name, wanted, value, "{:.1f} times", lambda value: value >= 15)


def _memory(results: Results, half: str, row: Row | None) -> Verdict:
    name, wanted = "device memory, of weights and cache", "at most 115 %"
    weights = next((p.weights_bytes for p in results.participants if p.label == half), None)
    percent = None
    if row and weights and row.device_bytes is not None and row.cache_bytes is not None:
        percent = 100 * row.device_bytes / (weights + row.cache_bytes)
    return _verdict(name, wanted, percent, "{:.0f} %", lambda value: value <= 115)
