"""The page's plots: error by layer and by position, and how KL is distributed."""

from __future__ import annotations

import math
from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING

from neo_export.comparison.places import LAYER_PLACES, REGIONS

from neo_tools.diff.charts import Chart, Line, Marker, histogram, lines
from neo_tools.diff.page_parts import number, section, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_tools.diff.results import PlaceSummary, Results

__all__ = ["by_layer", "by_position", "kl_distribution"]

_POINTS = 256
"""Largest number of points in the plot by position; neighbours are averaged."""


def by_layer(results: Results) -> str:
    """Two plots: the accumulated error, and the local error of each step."""
    places = [place for place in results.places if place.graph == "score"]
    if not places:
        return ""
    layers = sorted({place.layer for place in places if place.layer is not None})
    x = [float(layer) for layer in layers]
    names = [f"{layer}{results.attention_layers[layer][0]}" for layer in layers]
    fault = results.first_fault
    markers = (
        (Marker(float(fault.layer), f"fault: {fault.place}", fault=True),)
        if fault is not None and fault.layer is not None
        else ()
    )
    accumulated = [
        Line(f"{region} the window", _of(places, layers, "residual", region, "cumulative_median"))
        for region in REGIONS
    ]
    worst = _worst_by_layer(results.places, layers)
    note = (
        "<p>Relative L2 of hidden states, median over positions. Layers are global (g) or local "
        "(l).</p>"
    )
    return section(
        "Error by layer",
        note,
        "<h3>After each layer, accumulated from the tokens on</h3>",
        lines(
            Chart(
                "by-layer",
                "Accumulated error of the hidden state after each layer, by region",
                "layer",
                "relative L2",
                markers,
            ),
            x,
            [line for line in accumulated if any(v is not None for v in line.values)],
            names,
        ),
        "<h3>Each step by itself, from the bundle's own inputs; worst region and graph</h3>",
        lines(
            Chart(
                "by-place",
                "Error of each step of each layer, computed from the bundle's own inputs",
                "layer",
                "relative L2",
                markers,
            ),
            x,
            worst,
            names,
        ),
        _place_table(results),
    )


def _of(
    places: Sequence[PlaceSummary], layers: Sequence[int], name: str, region: str, figure: str
) -> list[float | None]:
    found = {
        place.layer: float(getattr(place, figure))
        for place in places
        if place.place == name and place.region == region
    }
    return [found.get(layer) for layer in layers]


def _worst_by_layer(places: Sequence[PlaceSummary], layers: Sequence[int]) -> list[Line]:
    worst: dict[tuple[str, int], float] = defaultdict(float)
    for place in places:
        if place.layer is not None:
            key = (place.place, place.layer)
            worst[key] = max(worst[key], _number_or_infinity(place.local_median))
    shown = [name for name in LAYER_PLACES if name != "residual"]
    return [
        Line(name.replace("_", " "), [worst.get((name, layer)) for layer in layers])
        for name in shown
        if any((name, layer) in worst for layer in layers)
    ]


def _number_or_infinity(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _place_table(results: Results) -> str:
    rows = (
        (
            f"{'' if place.layer is None else f'layer {place.layer} '}{escape(place.place)}",
            escape(place.graph),
            place.region,
            str(place.positions),
            number(place.local_median),
            number(place.local_max),
            number(place.cumulative_median),
            number(place.cumulative_max),
        )
        for place in results.places
    )
    heads = (
        "place",
        "graph",
        "region",
        "positions",
        "own step, median",
        "own step, worst",
        "accumulated, median",
        "accumulated, worst",
    )
    return (
        "<details><summary>All places, graphs and regions</summary>"
        + table("places", heads, rows)
        + "</details>"
    )


def by_position(results: Results) -> str:
    """KL and error of the logits along the contexts, with the window marked."""
    sums: dict[int, list[float]] = defaultdict(list)
    errors: dict[int, list[float]] = defaultdict(list)
    found = results.positions
    for position, kl, error in zip(
        found["position"], found["kl"], found["logit_error"], strict=True
    ):
        sums[position].append(kl)
        errors[position].append(error)
    positions = sorted(sums)
    stride = max(1, math.ceil(len(positions) / _POINTS))
    groups = [positions[start : start + stride] for start in range(0, len(positions), stride)]

    def means(values: dict[int, list[float]]) -> list[float | None]:
        pooled = [[v for at in group for v in values[at]] for group in groups]
        return [sum(some) / len(some) for some in pooled]

    x = [float(group[0]) for group in groups]
    window = results.window_size
    marker = (Marker(float(window), f"window {window}"),) if window <= x[-1] else ()
    return section(
        "Error by position",
        f"<p>Mean over {len(results.contexts)} contexts"
        + (f", {stride} neighbouring positions together" if stride > 1 else "")
        + ", score graph.</p>",
        lines(
            Chart("by-position", "Error of the logits by position", "position", "", marker),
            x,
            [Line("KL divergence, nats", means(sums)), Line("logits, relative L2", means(errors))],
        ),
    )


def kl_distribution(results: Results) -> str:
    """The histogram of KL, with the limit of the mean marked."""
    limit = next(check.limit for check in results.checks if check.option == "--max-kl")
    return section(
        "KL divergence",
        "<p>Positions by their KL(reference ‖ bundle), score graph; the limit is one of their "
        "mean.</p>",
        histogram(
            Chart(
                "kl-histogram",
                "How many positions have which KL divergence",
                "KL divergence, nats",
                "positions",
                (Marker(limit, "limit of the mean"),),
            ),
            results.kl_histogram["edges"],
            results.kl_histogram["counts"],
        ),
    )
