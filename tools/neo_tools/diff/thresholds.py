"""May it ship? Limits for what was found, by default those of the bundle's precision."""

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
    """What was asked for; None for the precision's own."""

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
    """Every limit.

    Means and medians are judged on the worst of the graphs, the share of positions on the score
    graph, which has every position: of the few that prefill shows, one is several percents.

    Args:
        limits: what was asked for.
        own: for all that was not.
        graphs: with their regions.
        found: the perplexities.
        faults: places that are off.
    """
    whole = [graph for graph in graphs if graph.region == "all"]

    def at_most(
        name: str,
        option: str,
        value: float,
        limit: float,
        meaning: str,
        graph: GraphSummary | None = None,
    ) -> Check:
        of = (None, None) if graph is None else (graph.graph, graph.positions)
        return Check(name, option, value, limit, True, value <= limit, meaning, *of)

    def worst(value: Callable[[GraphSummary], float]) -> GraphSummary:
        return max(whole, key=lambda graph: _nan_last(value(graph)))

    def chosen(asked: float | None, default: float) -> float:
        return default if asked is None else asked

    scored = next(graph for graph in whole if graph.graph == "score")
    furthest = worst(lambda graph: graph.kl_mean)
    most_off = worst(lambda graph: graph.logit_error_median)
    least = chosen(limits.min_top_1, own.min_top_1)
    return (
        at_most(
            "mean KL",
            "--max-kl",
            furthest.kl_mean,
            chosen(limits.max_kl, own.max_kl),
            "KL(reference ‖ bundle) in nats, mean over positions, worst graph",
            furthest,
        ),
        Check(
            "top-1 agreement",
            "--min-top1",
            scored.top_1,
            least,
            False,
            scored.top_1 >= least,
            "share of positions with the same best token, score graph",
            scored.graph,
            scored.positions,
        ),
        at_most(
            "perplexity increase",
            "--max-ppl-increase",
            found.increase,
            chosen(limits.max_perplexity_increase, own.max_perplexity_increase),
            "bundle / reference − 1, score graph",
        ),
        at_most(
            "logit error",
            "--max-logit-error",
            most_off.logit_error_median,
            chosen(limits.max_logit_error, own.max_logit_error),
            "relative L2 of a position's logits, median over positions, worst graph",
            most_off,
        ),
        at_most("faults", "", float(len(faults)), 0.0, "places whose own step is wrong"),
    )


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value
