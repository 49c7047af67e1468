"""The check of scores against `--max-drop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_tools.evaluate.paired import Table

__all__ = ["NOTHING_CHECKED", "Check", "checks", "verdict"]

NOTHING_CHECKED = (
    "--max-drop checks metrics that are means over samples and better if higher, such as an "
    "accuracy; these tasks have none. Leave it out, or add a task that has one"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The check of one metric of one model; the metric is a mean over samples."""

    task: str
    metric: str
    model: str
    found: float
    """Mean of the model minus mean of the baseline, in the unit of the metric."""
    limit: float
    """Minimum of `found`: −`max_drop`."""
    passed: bool


def checks(table: Table, max_drop: float) -> list[Check]:
    """Check all metrics that are means over samples and better if higher, such as accuracy.

    A perplexity is not checked: it is exp(−mean), in another unit.

    Args:
        table: scores and their differences from the baseline.
        max_drop: how much lower than the baseline's a mean may be; below 0, it must be higher.
    """
    return [
        Check(
            task=score.task,
            metric=score.metric,
            model=name,
            found=apart.mean,
            limit=-max_drop,
            passed=apart.mean >= -max_drop,
        )
        for score, others in table
        for name, _, apart in others
        if apart is not None and score.higher_is_better and not apart.is_log
    ]


def verdict(checked: Sequence[Check]) -> str:
    """One line per check, then the overall result."""
    lines = [
        f"{'ok  ' if one.passed else 'PAST'} {one.task} {one.metric}, {one.model}: "
        f"{one.found:+.4f}, limit ≥ {one.limit:+g}"
        for one in checked
    ]
    passed = all(one.passed for one in checked)
    return "\n".join([*lines, "", f"{'' if passed else 'NOT '}within all limits"]) + "\n"
