"""Scores of models, and paired differences between models that answered the same questions.

Most of the uncertainty of a score comes from the choice of the questions, which is the same for
both models. So the standard error of a difference is that of the mean of the per-sample differences
(Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Difference", "Results", "Score", "Table", "difference", "scores", "tabulated"]

Results = Mapping[str, Any]
"""Return value of `lm_eval.simple_evaluate`, with samples."""
Table = list[tuple["Score", list[tuple[str, "Score", "Difference | None"]]]]
"""For each metric: the baseline's score, and name, score and difference of each other model."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    """Standard error; None if the score is neither a mean over samples nor exp(−mean)."""
    higher_is_better: bool
    samples: int

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, metric and filter."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model's score minus the baseline's, where scores are means over samples."""

    is_log: bool
    """Whether it is the difference of the natural logarithms: a perplexity is exp(−mean)."""
    mean: float
    error: float
    """Standard error of `mean`."""
    changed: int
    """Number of samples whose values differ."""


def scores(results: Results) -> list[Score]:
    """The scores of all tasks and metrics, in the order of the harness."""
    found = []
    for task, entries in results["results"].items():
        for name, value in entries.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            values = list(_values(results, task, metric, filtered).values())
            found.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filtered,
                    value=float(value),
                    error=_error(float(value), values),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric, True),
                    samples=len(values),
                )
            )
    return found


def _error(value: float, samples: Sequence[float]) -> float | None:
    is_log = _is_log(value, samples)
    if is_log is None:
        return None
    return _standard_error(samples) * (value if is_log else 1)


def _is_log(value: float, samples: Sequence[float]) -> bool | None:
    """False for the mean of the samples, True for exp(−mean), None for anything else."""
    if not samples:
        return None
    mean = sum(samples) / len(samples)
    if _equal(value, mean):
        return False
    return True if value > 0 and _equal(math.log(value), -mean) else None


def difference(baseline: Results, other: Results, score: Score) -> Difference | None:
    """The paired difference between two models in one score.

    Args:
        baseline: the results of the baseline.
        other: the results of the other model.
        score: the baseline's score.

    Returns:
        None if the score is neither a mean over samples nor exp(−mean), or if the models have
        different samples.
    """
    first, second = (_values(results, *score.key) for results in (baseline, other))
    if not first or first.keys() != second.keys():
        return None
    is_log = _is_log(score.value, list(first.values()))
    if is_log is None:
        return None
    sign = -1 if is_log else 1
    differences = [sign * (second[name] - first[name]) for name in first]
    return Difference(
        is_log=is_log,
        mean=sum(differences) / len(differences),
        error=_standard_error(differences),
        changed=sum(value != 0 for value in differences),
    )


def tabulated(results: Mapping[str, Results]) -> Table:
    """Scores and differences of several models, by name; the first is the baseline."""
    (_, baseline), *others = results.items()
    theirs = {name: {score.key: score for score in scores(found)} for name, found in others}
    return [
        (
            score,
            [
                (name, theirs[name][score.key], difference(baseline, found, score))
                for name, found in others
            ],
        )
        for score in scores(baseline)
    ]


def _equal(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))


def _values(results: Results, task: str, metric: str, filtered: str) -> dict[Any, float]:
    """Values of one metric by sample, with the harness's `doc_id` as key."""
    found = {}
    for sample in results.get("samples", {}).get(task, ()):
        value = sample.get(metric)
        if sample.get("filter", filtered) == filtered and isinstance(value, Real):
            found[sample["doc_id"]] = float(value)
    return found
