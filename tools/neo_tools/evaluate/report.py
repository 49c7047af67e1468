"""Scores of several models as a table, or as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_tools.evaluate.gate import Check
    from neo_tools.evaluate.paired import Score, Table

__all__ = ["markdown", "plain"]


def markdown(table: Table, baseline: str) -> str:
    """A Markdown table with a row for each metric and model."""
    lines = [
        "| task | metric | model | score | difference (paired) | samples that differ |",
        "|---|---|---|---|---|---|",
    ]
    for score, others in table:
        metric = f"{score.metric} {'↑' if score.higher_is_better else '↓'}"
        lines.append(f"| {score.task} | {metric} | {baseline} | {_value(score)} | | |")
        for name, own, found in others:
            shown, changed = "", ""
            if found is not None:
                shown = f"{found.mean:+.4f} ± {found.error:.4f}{' (ln)' if found.is_log else ''}"
                changed = "" if found.is_log else f"{found.changed} of {score.samples}"
            lines.append(f"| | | {name} | {_value(own)} | {shown} | {changed} |")
    return "\n".join(lines) + "\n"


def _value(score: Score) -> str:
    if score.error is None or math.isnan(score.error):
        return f"{score.value:.4f}"
    return f"{score.value:.4f} ± {score.error:.4f}"


def plain(table: Table, baseline: str, checked: Sequence[Check] | None = None) -> dict[str, Any]:
    """The same contents for JSON.

    Args:
        table: scores and differences.
        baseline: name of the baseline.
        checked: results of the checks; None without `--max-drop`.
    """
    limits: dict[str, Any] = {}
    if checked is not None:
        limits["checks"] = [asdict(one) for one in checked]
        limits["passed"] = all(one.passed for one in checked)
    return {
        "baseline": baseline,
        **limits,
        "scores": [
            {
                **asdict(score),
                "others": [
                    {
                        "model": name,
                        "value": own.value,
                        "error": own.error,
                        "difference": None if found is None else asdict(found),
                    }
                    for name, own, found in others
                ],
            }
            for score, others in table
        ],
    }
