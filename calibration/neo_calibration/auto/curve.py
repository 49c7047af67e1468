"""The trade-off curve: plans along the frontier, beside bundles with all matrices alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_calibration.auto.report import Point, point_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_calibration.auto.choose import Chooser, Chosen
    from neo_calibration.auto.judge import Judge
    from neo_calibration.auto.search import Frontier

__all__ = ["curve_points"]

_PLANS = 8
"""Plans of the frontier that are measured besides those that the search measured."""
_HEADROOM = 0.6
"""The most exact of them, by the estimate, in shares of the divergence of all int8. Beyond it
matrices go back to float32, one by one: much larger bundles that few will ask for."""


def curve_points(
    frontier: Frontier,
    chooser: Chooser,
    chosen: Chosen,
    judge: Judge,
    progress: Callable[[str, int, int], None],
) -> list[Point]:
    """Measure what the search did not, and name it all.

    Args:
        frontier: the plans.
        chooser: what measured them.
        chosen: the plan that was taken.
        judge: measures bundles without statistics.
        progress: called with a stage's name.
    """
    points = []
    alike = {str(s): frontier.uniform(s) for s in frontier.storages}
    for name, plan in alike.items():
        points.append(point_of(name, "calibrated", chooser.of(plan).measured))
        progress(f"{name} without statistics", 0, 0)
        points.append(point_of(name, "rounded", judge.rounded(plan.plan)))
    for budget in _budgets(frontier, [plan.divergence for plan in alike.values()]):
        chooser.at(frontier.last_within(budget))
    uniform = {plan.plan for plan in alike.values()}
    found_plans = [c for plan, c in chooser.measured.items() if plan not in uniform or c == chosen]
    found_plans.sort(key=lambda found: found.plan.size)
    for number, found in enumerate(found_plans, start=1):
        if found.plan.divergence > 0:  # all of float32 has no place on a logarithmic scale
            name = "chosen" if found == chosen else f"plan {number}"
            points.append(point_of(name, "auto", found.measured))
    return points


def _budgets(frontier: Frontier, alike: list[float]) -> list[float]:
    """Estimates, in nats, up to which the plans on the curve go."""
    if len(frontier) == 1:  # every matrix is kept in float32
        return []
    low = max(_HEADROOM * min(alike, default=0.0), float(frontier.divergences[1]))
    high = float(frontier.divergences[-1])
    return [float(budget) * (1 + 1e-9) for budget in np.geomspace(min(low, high), high, _PLANS)]
