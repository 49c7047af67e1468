"""Results as CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_tools.bench.results import Results, Row
    from neo_tools.bench.spread import Spread

__all__ = ["CSV_COLUMNS", "to_csv"]

CSV_COLUMNS = (
    "label",
    "kind",
    "precision",
    "threads",
    "batch",
    "test",
    "prompt",
    "new_tokens",
    "depth",
    "rounds",
    "tokens_per_second",
    "tokens_per_second_min",
    "tokens_per_second_max",
    "first_token_seconds",
    "token_p50_seconds",
    "token_p99_seconds",
    "load_seconds",
    "load_to_first_token_seconds",
    "private_bytes",
    "proportional_bytes",
    "device_bytes",
    "cache_bytes",
    "bytes_per_token",
    "bytes_are_nominal",
    "read_rate",
    "limit",
    "limit_share",
    "round_limit_share",
    "round_limit_share_min",
    "round_limit_share_max",
    "python_seconds",
    "generate_python_seconds",
)
"""Columns of the CSV, in seconds, bytes and bytes per second; empty if a number does not exist.
Three more follow for each bundle with ratios (`ratio to NAME`, `… min`, `… max`)."""


def to_csv(results: Results) -> str:
    """One line per participant and case."""
    bundles = sorted({ratio.bundle for ratio in results.ratios})
    ratio_columns = [f"ratio to {b}{end}" for b in bundles for end in ("", " min", " max")]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, (*CSV_COLUMNS, *ratio_columns), lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow(_flat(results, row) | _flat_ratios(results, row))
    return stream.getvalue()


def _flat(results: Results, row: Row) -> dict[str, Any]:
    facts = results.facts_of(row)
    [limits] = [limit for limit in results.limits if limit.threads == row.threads]
    derived = {
        "rounds": len(row.round_seconds),
        **_flat_spread("tokens_per_second", row.tokens_per_second),
        **_flat_spread("round_limit_share", row.round_limit_share),
        "load_seconds": facts.load_seconds,
        "load_to_first_token_seconds": facts.first_token_seconds,
        "limit": limits.bandwidth,
    }
    return {name: derived[name] if name in derived else getattr(row, name) for name in CSV_COLUMNS}


def _flat_spread(name: str, spread: Spread | None, joint: str = "_") -> dict[str, float | None]:
    """Columns for the median, the smallest and the largest value."""
    values = (None,) * 3 if spread is None else (spread.median, spread.min, spread.max)
    return dict(zip((name, f"{name}{joint}min", f"{name}{joint}max"), values, strict=True))


def _flat_ratios(results: Results, row: Row) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    case = (row.test, row.threads, row.batch, row.label)
    for ratio in results.ratios:
        if (ratio.test, ratio.threads, ratio.batch, ratio.other) == case:
            found |= _flat_spread(f"ratio to {ratio.bundle}", ratio.spread, " ")
    return found
