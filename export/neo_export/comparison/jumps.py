"""Bundle against bundle: the place at which the accumulated error jumps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_export.comparison.faults import Fault
from neo_export.comparison.places import REGIONS, all_places, region_masks
from neo_export.tolerances import ACCUMULATED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.bundle.manifest import ModelSpec

    from neo_export.comparison.errors import PlaceErrors, Series

__all__ = ["find_jumps"]

_JUMP, _LEAST = 8.0, 1 / 5
"""An error jumps if it is at least this multiple of the largest error at earlier places, and at
least this share of its limit."""


def find_jumps(errors: PlaceErrors, spec: ModelSpec, names: Sequence[str]) -> list[Fault]:
    """Places whose accumulated error exceeds the coarser bundle's limit, or jumps.

    Without the reference's weights one cannot tell whether a step is wrong or its inputs already
    were: only the first of these places is certain to be where an error arose.

    Args:
        errors: errors of all places.
        spec: the model.
        names: the keys of `ACCUMULATED` for the two bundles.
    """
    coarser = max((ACCUMULATED[name] for name in names), key=lambda limits: limits.worst)
    before = dict.fromkeys(errors.graphs, 0.0)
    found = []
    for layer, place in all_places(spec):
        off: dict[tuple[str, str], tuple[float, float]] = {}
        seen: set[str] = set()
        for graph in errors.graphs:
            series = errors.series(graph, (layer, place))
            if series is None:
                continue
            allowed = coarser.worst
            if before[graph] > 0:
                allowed = min(allowed, max(_JUMP * before[graph], _LEAST * allowed))
            for region, (worst, median) in _by_region(series, place, spec.window_size).items():
                seen.add(region)
                if not worst <= allowed:
                    off[graph, region] = worst, allowed
                elif median > coarser.median:
                    off[graph, region] = median, coarser.median
            if not place.startswith("cached"):
                before[graph] = max(before[graph], float(np.max(series.cumulative)))
        if off:
            error, limit = max(off.values())
            regions = {region for _, region in off}
            affected = tuple(region for region in REGIONS if region in regions)
            found.append(
                Fault(
                    layer=layer,
                    place=place,
                    region="everywhere" if regions == seen else affected[0],
                    regions=affected,
                    graphs=tuple(dict.fromkeys(graph for graph, _ in off)),
                    error=error,
                    limit=limit,
                )
            )
    return found


def _by_region(series: Series, place: str, window: int) -> dict[str, tuple[float, float]]:
    """Largest and median error of each region that has positions; NaN counts as infinite."""
    result = {}
    for region, mask in region_masks(series.positions, window).items():
        chosen = series.cumulative[mask]
        if place.startswith("cached"):
            chosen = chosen[~np.isnan(chosen)]  # positions evicted from the cache before the check
        if len(chosen):
            finite = np.nan_to_num(chosen, nan=np.inf)
            result[region] = float(finite.max()), float(np.median(finite))
    return result
