"""The trade-off curve: plans along the frontier, and uniform bundles to compare with."""

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
"""Plans of the frontier that are measured in addition to those of the search."""
_HEADROOM = 1.1
"""Size of the largest of them, relative to the uniform int8 plan. In larger plans matrices are
float32 again, one after the other: much larger bundles, which few need."""


@dataclass(frozen=True)
class Point:
    """One bundle on the trade-off curve."""

    name: str
    kind: str
    """"auto", "calibrated" (uniform) or "rounded" (uniform)."""
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
    """Measure the points that the search did not measure, and name all points.

    Args:
        frontier: the plans.
        chooser: the chooser of the search, with its measurements.
        chosen: the chosen plan.
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
        if found.plan.divergence > 0:  # a logarithmic scale has no place for float32's 0
            name = "chosen" if found == chosen else f"plan {number}"
            points.append(_point_of(name, "auto", found.measured))
    return points


def _point_of(name: str, kind: str, measured: Measured) -> Point:
    """The point of a measured bundle."""
    return Point(name, kind, measured.size, measured.divergence, measured.interval)
