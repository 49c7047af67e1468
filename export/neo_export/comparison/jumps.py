"""Bundle against bundle: the place at which the accumulated error jumps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_export.comparison.faults import Fault
from neo_export.comparison.places import REGIONS, all_places, region_masks
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.manifest import ModelSpec

    from neo_export.comparison.errors import PlaceErrors, Series

__all__ = ["find_jumps"]

_JUMP = 8.0
"""Multiple of the largest median before, from which on an error has jumped."""


def find_jumps(errors: PlaceErrors, spec: ModelSpec, precisions: Sequence[str]) -> list[Fault]:
    """Places whose accumulated error is past the coarser precision's limit, or far past all before.

    Without the reference's weights there is no telling whether a step went wrong or its inputs
    were wrong already: only the first is sure to be where it arose.
    """
    limits = [TOLERANCES[name] for name in precisions]
    before = dict.fromkeys(errors.graphs, 0.0)
    found = []
    for layer, place in all_places(spec):
        graphs, regions, seen, worst = [], [], [], 0.0
        limit = max(tolerance.of_place(place) for tolerance in limits)
        for graph in errors.graphs:
            series = errors.series(graph, (layer, place))
            if series is None:
                continue
            by_region = _worst(series, place, spec.window_size)
            seen += list(by_region)
            allowed = limit
            if before[graph] > 0:
                allowed = min(limit, max(_JUMP * before[graph], limit / 10))
            off = {region: error for region, error in by_region.items() if not error <= allowed}
            if off:
                graphs.append(graph)
                regions += list(off)
                worst = max(worst, *off.values())
            if not place.startswith("cached"):
                before[graph] = max(before[graph], float(np.max(series.cumulative)))
        if graphs:
            affected = tuple(region for region in REGIONS if region in regions)
            everywhere = set(affected) == set(seen)
            found.append(
                Fault(
                    layer=layer,
                    place=place,
                    region="everywhere" if everywhere else affected[0],
                    regions=affected,
                    graphs=tuple(graphs),
                    error=worst,
                    limit=limit,
                )
            )
    return found


def _worst(series: Series, place: str, window: int) -> dict[str, float]:
    """Largest error of each region that there are positions of; NaN counts as infinite."""
    result = {}
    for region, mask in region_masks(series.positions, window).items():
        chosen = series.cumulative[mask]
        if place.startswith("cached"):
            chosen = chosen[~np.isnan(chosen)]  # left the cache before anyone looked
        if len(chosen):
            result[region] = float(np.nan_to_num(chosen, nan=np.inf).max())
    return result
