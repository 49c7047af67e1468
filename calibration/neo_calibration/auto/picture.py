"""Draws the trade-off curve as SVG: bytes of the weight file against KL divergence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neo_export.reports import svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_calibration.auto.curve import Point

__all__ = ["to_svg"]

_WIDTH, _HEIGHT = 760, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 190, 46, 58
_COLORS = {"auto": svg.COLORS[0], "calibrated": svg.COLORS[2], "rounded": svg.COLORS[1]}
_NAMES = {
    "auto": "--auto, calibrated",
    "calibrated": "all alike, calibrated",
    "rounded": "all alike, rounded",
}


def to_svg(points: Sequence[Point], title: str) -> str:
    """Draw all points except exact ones, whose divergence is 0.

    A line joins the possible answers of a search: the Pareto-optimal ones among the plans and the
    uniform calibrated bundles.
    """
    drawn = [point for point in points if point.divergence > 0]
    x, step = _size_axis([point.size for point in drawn])
    y, marks = _divergence_axis([edge for point in drawn for edge in _interval(point)])
    sizes = [number * step for number in range(round(x.low / step), round(x.high / step) + 1)]
    optimal = [(x(point.size), y(point.divergence)) for point in _pareto_optimal(drawn)]
    parts = [
        svg.text(_LEFT, 26, title, "title"),
        svg.axes(
            x,
            y,
            [(size, f"{size / 1e6:g}") for size in sizes],
            [(value, f"{value:g}") for value in marks],
            "weights.bin, MB",
            "KL divergence from float32, nats",
        ),
        svg.path(optimal, "", fill="none", stroke=_COLORS["auto"], stroke_width=1.5),
        *(_point(x, y, point) for point in drawn),
        *_legend([kind for kind in _COLORS if any(p.kind == kind for p in drawn)]),
    ]
    return svg.document(_WIDTH, _HEIGHT, title, parts)


def _size_axis(sizes: Sequence[int]) -> tuple[svg.Axis, float]:
    """The axis of sizes, and the bytes between two ticks."""
    step = svg.round_step(max(sizes) - min(sizes) or max(sizes))
    low = step * math.floor(min(sizes) / step - 1e-9)
    high = step * math.ceil(max(sizes) / step + 1e-9)
    return svg.Axis(low=low, high=high, start=_LEFT, stop=_WIDTH - _RIGHT), step


def _divergence_axis(values: Sequence[float]) -> tuple[svg.Axis, list[float]]:
    """The axis of divergences in nats, and its ticks: 1, 2 and 5 times powers of ten."""
    around = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    marks = [factor * 10.0**power for power in around for factor in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= min(values))
    last = min(i for i, mark in enumerate(marks) if mark >= max(values))
    marks = marks[first : max(last, first + 1) + 1]
    ends = {"low": marks[0], "high": marks[-1]}
    return svg.Axis(**ends, start=_HEIGHT - _BOTTOM, stop=_TOP, log=True), marks


def _interval(point: Point) -> tuple[float, float]:
    return point.interval or (point.divergence, point.divergence)


def _pareto_optimal(points: Sequence[Point]) -> list[Point]:
    """The Pareto-optimal points, by increasing size."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.divergence)):
        if point.kind != "rounded" and (not best or point.divergence < best[-1].divergence):
            best.append(point)
    return best


def _point(x: svg.Axis, y: svg.Axis, point: Point) -> str:
    at, up, color = x(point.size), y(point.divergence), _COLORS[point.kind]
    low, high = map(y, _interval(point))
    words = f"{point.name}: {point.size / 1e6:.3f} MB, {point.divergence:.3g} nats"
    named = point.kind != "auto" or point.name == "chosen"
    return (
        svg.line(at, low, at, high, stroke=color)
        + svg.mark(at, up, color, words, **_shape(point.kind))
        + svg.text(at + 8, up - 6, point.name if named else "", "small")
    )


def _shape(kind: str) -> dict[str, bool]:
    """The marker of a kind: kinds differ in shape as well as in colour."""
    return {"square": kind != "auto", "hollow": kind == "rounded"}


def _legend(kinds: Sequence[str]) -> list[str]:
    x, y = _WIDTH - _RIGHT + 14, _TOP + 14
    found = [
        svg.key(x, y + 22 * row, _COLORS[kind], _NAMES[kind], **_shape(kind))
        for row, kind in enumerate(kinds)
    ]
    return [*found, svg.text(x, y + 12 + 22 * len(kinds), "bars: 95 % intervals", "small")]
