"""Finds faults: places whose local error exceeds the limit of the bundle's precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neo_export.comparison.places import (
    CACHED,
    EXACT,
    REGIONS,
    all_places,
    place_text,
    region_masks,
)
from neo_export.tolerances import LOCAL

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import ModelSpec

    from neo_export.comparison.errors import PlaceErrors, Series
    from neo_export.comparison.places import Place
    from neo_export.tolerances import LocalLimits

__all__ = ["Fault", "find_faults", "limits_for"]

_LEAST_OTHERS = 3
_LEAST_JUDGED = 8
"""Fewest positions for which a median is judged. With one or two positions, a correct bundle with
rounded activations exceeds the limit in one of five texts of one context."""


@dataclass(frozen=True)
class Fault:
    """A step that is wrong even on the bundle's own inputs."""

    layer: int | None
    place: str
    region: str
    """`everywhere`, or the first region that is affected: `below`, `at` or `past` the window."""
    regions: tuple[str, ...]
    """All regions that are affected."""
    graphs: tuple[str, ...]
    """The graphs that are affected."""
    error: float
    """Relative L2 error of this step in the worst region: the worst position if the place is exact
    or few positions are off, otherwise the median. Infinite if values are not finite."""
    limit: float
    kind: str | None = None
    """The usual mistake that explains it, if one does."""

    @property
    def where(self) -> str:
        """The place and the regions, for messages."""
        return place_text(self.layer, self.place)


def limits_for(precision: str) -> LocalLimits:
    """The limits of a precision; a mixed bundle has those of its coarsest storage."""
    return LOCAL.get(precision, LOCAL["int4"])


def find_faults(errors: PlaceErrors, spec: ModelSpec, precision: str) -> list[Fault]:
    """Every place whose local error exceeds its limit, in the order of computation."""
    limits = limits_for(precision)
    found = []
    for place in all_places(spec):
        fault = _fault_at(errors, place, spec, limits)
        if fault is not None:
            found.append(fault)
    return sorted(found, key=lambda fault: _late_caches(fault, found))


def _late_caches(fault: Fault, found: list[Fault]) -> tuple[int, bool]:
    """Sort key that puts a cache after its layer's attention if it cannot be the cause.

    A wrong window also makes a graph keep too few positions. Score has no cache, and prefill first
    runs without one, before it runs between stretches of decode. So if the attention is wrong in
    such a graph whose cache is right, the cache is not the cause. Nor is it the cause of errors at
    positions before the first wrong one in the cache.
    """
    layer = fault.layer
    if layer is None:
        return (-1 if fault.place == "embedding" else 1 << 30), False
    attended = next((f for f in found if (f.layer, f.place) == (layer, "attended")), None)
    if attended is None or fault.place not in CACHED:
        return layer, False
    earlier = REGIONS.index(attended.regions[0]) < REGIONS.index(fault.regions[0])
    return layer, earlier or bool({"score", "prefill"} & set(attended.graphs) - set(fault.graphs))


def _fault_at(
    errors: PlaceErrors, place: Place, spec: ModelSpec, limits: LocalLimits
) -> Fault | None:
    graphs, regions, seen = [], [], []
    worst, limit = 0.0, limits.exact
    for graph in errors.graphs:
        series = errors.series(graph, place)
        if series is None:
            continue
        usual = _limit(errors, graph, place, spec, limits)
        by_region = _by_region(series, place, spec)
        off = {
            region: excess
            for region, figures in by_region.items()
            if (excess := _excess(*figures, usual, limits.worst)) is not None
        }
        # A region with few positions is no evidence that the step is right there.
        seen += [name for name, (judged, _) in by_region.items() if judged is not None]
        seen += off
        if off:
            graphs.append(graph)
            regions += list(off)
            worst, limit = max((worst, limit), *off.values())
    if not graphs:
        return None
    affected = tuple(region for region in REGIONS if region in regions)
    # Texts that do not reach the window have one region only, which then means everywhere.
    everywhere = set(affected) == set(seen)
    layer, name = place
    return Fault(
        layer=layer,
        place=name,
        region="everywhere" if everywhere else affected[0],
        regions=affected,
        graphs=tuple(graphs),
        error=float(worst),
        limit=limit,
    )


def _limit(
    errors: PlaceErrors, graph: str, place: Place, spec: ModelSpec, limits: LocalLimits
) -> float:
    layer, name = place
    if name in EXACT:
        return limits.exact
    held = (graph, place) in errors.held
    product = limits.held if held else limits.product
    if layer is None:
        return product
    others = [
        float(np.median(series.local))
        for other in range(spec.num_layers)
        if other != layer
        and ((graph, (other, name)) in errors.held) == held
        and (series := errors.series(graph, (other, name))) is not None
    ]
    if len(others) < _LEAST_OTHERS:
        return product
    usual = float(np.median(others))
    return min(product, max(limits.outlier * usual, product / 10))


def _by_region(
    series: Series, place: Place, spec: ModelSpec
) -> dict[str, tuple[float | None, float]]:
    """The judged figure (or None) and the worst position of each region that the texts reach."""
    statistic = np.max if place[1] in EXACT else np.median
    result: dict[str, tuple[float | None, float]] = {}
    for region, mask in region_masks(series.positions, spec.window_size).items():
        chosen = series.local[mask]
        if place[1].startswith("cached"):
            chosen = chosen[~np.isnan(chosen)]  # positions evicted from the cache before the check
        elif np.isnan(chosen).any():
            result[region] = float("inf"), float("inf")
            continue
        if len(chosen):
            # A median of few positions is almost the worst one, which has its own limit.
            is_judged = place[1] in EXACT or len(chosen) >= _LEAST_JUDGED
            judged = float(statistic(chosen)) if is_judged else None
            result[region] = judged, float(chosen.max())
    return result


def _excess(
    judged: float | None, worst: float, usual: float, most: float
) -> tuple[float, float] | None:
    """A figure that exceeds its limit, and that limit; None if both are within theirs.

    Args:
        judged: for an exact place the worst position, otherwise the median; None if there are too
            few positions.
        worst: the worst position.
        usual: limit for `judged`.
        most: limit for `worst`, at places that are not exact.
    """
    if judged is not None and not judged <= usual:
        return judged, usual
    return (worst, most) if not worst <= max(most, usual) else None
