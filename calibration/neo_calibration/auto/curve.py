"""The trade-off curve: plans along the frontier, beside bundles with all matrices alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_calibration.auto.choose import Chooser, Chosen
    from neo_calibration.auto.judge import Judge, Measured
    from neo_calibration.auto.search import Frontier

__all__ = ["Point", "curve_points"]

_PLANS = 10
"""Plans of the frontier that are measured besides those that the search measured."""
_HEADROOM = 1.1
"""The largest of them, in shares of all int8. Beyond it matrices go back to float32, one by one:
much larger bundles that few will ask for."""


@dataclass(frozen=True)
class Point:
    """One bundle on the trade-off curve."""

    name: str
    kind: str
    """"auto", "calibrated" (all alike) or "rounded" (all alike)."""
    size: int
    """Bytes of weights.bin."""
    divergence: float
    interval: tuple[float, float] | None


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
        points.append(_point_of(name, "calibrated", chooser.of(plan).measured))
        progress(f"{name} without statistics", 0, 0)
        points.append(_point_of(name, "rounded", judge.rounded(plan.plan)))
    largest = _HEADROOM * max((plan.size for plan in alike.values()), default=0)
    sizes = np.linspace(frontier.sizes[-1], max(largest, frontier.sizes[-1]), _PLANS)
    curve = [chooser.at(frontier.first_fitting(int(size))) for size in sizes]
    rivals = [found for found in map(chooser.of, alike.values()) if found not in (*curve, chosen)]
    plans = [found for found in chooser.measured.values() if found not in rivals]
    plans.sort(key=lambda found: found.plan.size)
    for number, found in enumerate(plans, start=1):
        if found.plan.divergence > 0:  # all of float32 has no place on a logarithmic scale
            name = "chosen" if found == chosen else f"plan {number}"
            points.append(_point_of(name, "auto", found.measured))
    return points


def _point_of(name: str, kind: str, measured: Measured) -> Point:
    """The point of a bundle that was measured."""
    return Point(name, kind, measured.size, measured.divergence, measured.interval)
