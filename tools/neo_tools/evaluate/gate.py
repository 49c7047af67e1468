"""May it ship? What `--max-drop` says of each score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_tools.evaluate.paired import Table

__all__ = ["NOTHING_CHECKED", "Check", "checks", "verdict"]

NOTHING_CHECKED = (
    "--max-drop checks means over samples of which more is better, such as an accuracy, and these "
    "tasks have none; leave it out, or add a task that has one"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One mean over samples, of one model."""

    task: str
    metric: str
    model: str
    found: float
    """The mean minus the baseline's, in the metric's own unit."""
    limit: float
    """What it must be at least: −`max_drop`."""
    passed: bool


def checks(table: Table, max_drop: float) -> list[Check]:
    """Of metrics where larger is better, such as accuracy; a perplexity has another unit.

    Args:
        table: scores with differences.
        max_drop: by so much a mean may be lower than the baseline's; below 0: must be higher.
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
    """A line each, and what they come to."""
    lines = [
        f"{'ok  ' if one.passed else 'PAST'} {one.task} {one.metric}, {one.model}: "
        f"{one.found:+.4f} ≥ {one.limit:+g}"
        for one in checked
    ]
    passed = all(one.passed for one in checked)
    return "\n".join([*lines, "", f"{'' if passed else 'NOT '}within all limits"]) + "\n"
