"""May the bundle ship? Checks the results against limits, by default those of its precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_tools.diff.results import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_export.comparison.faults import Fault
    from neo_export.tolerances import Quality

    from neo_tools.diff.results import GraphSummary, Perplexity

__all__ = ["Limits", "checks"]


@dataclass(frozen=True)
class Limits:
    """The limits that the user gave; None for the precision's own."""

    max_kl: float | None = None
    min_top_1: float | None = None
    max_perplexity_increase: float | None = None
    max_logit_error: float | None = None


def checks(
    limits: Limits,
    own: Quality,
    graphs: Sequence[GraphSummary],
    found: Perplexity,
    faults: Sequence[Fault],
) -> tuple[Check, ...]:
    """Check every limit.

    Means and medians are judged on the worst graph. The share of positions with the same best token
    is judged on the score graph, which has every position: prefill shows so few that a single one
    is several percent.

    Args:
        limits: the limits that the user gave.
        own: the precision's own limits, for all others.
        graphs: summaries of the graphs and their regions.
        found: the perplexities.
        faults: the faults.
    """
    whole = [graph for graph in graphs if graph.region == "all"]
    return (
        _mean_kl(limits, own, whole),
        _top_1(limits, own, whole),
        _perplexity(limits, own, found),
        _logit_error(limits, own, whole),
        _at_most(
            name="faults",
            option="",
            found=float(len(faults)),
            limit=0.0,
            meaning="places whose own step is wrong",
        ),
    )


def _mean_kl(limits: Limits, own: Quality, whole: Sequence[GraphSummary]) -> Check:
    furthest = _worst(whole, lambda graph: graph.kl_mean)
    return _at_most(
        name="mean KL",
        option="--max-kl",
        found=furthest.kl_mean,
        limit=_chosen(limits.max_kl, own.max_kl),
        meaning="KL(reference ‖ bundle) in nats, mean over positions, worst graph",
        graph=furthest,
    )


def _top_1(limits: Limits, own: Quality, whole: Sequence[GraphSummary]) -> Check:
    scored = next(graph for graph in whole if graph.graph == "score")
    least = _chosen(limits.min_top_1, own.min_top_1)
    return Check(
        name="top-1 agreement",
        option="--min-top1",
        found=scored.top_1,
        limit=least,
        at_most=False,
        passed=scored.top_1 >= least,
        meaning="share of positions with the same best token, score graph",
        graph=scored.graph,
        positions=scored.positions,
    )


def _perplexity(limits: Limits, own: Quality, found: Perplexity) -> Check:
    return _at_most(
        name="perplexity increase",
        option="--max-ppl-increase",
        found=found.increase,
        limit=_chosen(limits.max_perplexity_increase, own.max_perplexity_increase),
        meaning="bundle / reference − 1, score graph",
    )


def _logit_error(limits: Limits, own: Quality, whole: Sequence[GraphSummary]) -> Check:
    most_off = _worst(whole, lambda graph: graph.logit_error_median)
    return _at_most(
        name="logit error",
        option="--max-logit-error",
        found=most_off.logit_error_median,
        limit=_chosen(limits.max_logit_error, own.max_logit_error),
        meaning="relative L2 of a position's logits, median over positions, worst graph",
        graph=most_off,
    )


def _at_most(
    *,
    name: str,
    option: str,
    found: float,
    limit: float,
    meaning: str,
    graph: GraphSummary | None = None,
) -> Check:
    return Check(
        name=name,
        option=option,
        found=found,
        limit=limit,
        at_most=True,
        passed=found <= limit,
        meaning=meaning,
        graph=None if graph is None else graph.graph,
        positions=None if graph is None else graph.positions,
    )


def _worst(graphs: Sequence[GraphSummary], value: Callable[[GraphSummary], float]) -> GraphSummary:
    return max(graphs, key=lambda graph: _nan_last(value(graph)))


def _chosen(asked: float | None, default: float) -> float:
    return default if asked is None else asked


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value
