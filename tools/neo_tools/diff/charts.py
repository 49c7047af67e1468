"""Plots as inline SVG, coloured by the page's style sheet, for light and dark mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from neo_export.reports import svg

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Chart", "Line", "Marker", "histogram", "lines"]

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 26, 44
_SERIES = 8
"""Number of colours in the style sheet: classes s0 to s7."""
_FLOOR = 1e-12
"""Value at which a logarithmic axis shows zero."""


@dataclass(frozen=True)
class Line:
    """One line of a plot; `None` leaves a gap."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Marker:
    """A vertical line."""

    x: float
    text: str
    fault: bool = False


@dataclass(frozen=True)
class Chart:
    """The frame that all plots share."""

    identifier: str
    title: str
    """Text alternative for screen readers."""
    x_label: str
    y_label: str
    markers: tuple[Marker, ...] = ()


def lines(
    chart: Chart, x: Sequence[float], series: Sequence[Line], labels: Sequence[str] | None = None
) -> str:
    """Lines over a logarithmic axis.

    Args:
        chart: the plot's frame.
        x: x of each value.
        series: at most eight lines.
        labels: label of each x; by default numbers at round intervals.
    """
    found = [v for line in series for v in line.values if v is not None and math.isfinite(v)]
    across, up = _across(min(x), max(x)), _over(found)
    ticks = _ticks(across) if labels is None else list(zip(x, labels, strict=True))
    parts = [_frame(chart, across, up, _thinned(ticks, 26), _decades(up, 6))]
    parts += [_marker(marker, across(marker.x)) for marker in chart.markers]
    few = len(x) <= 60
    for number, line in enumerate(series[:_SERIES]):
        points = [
            None if v is None or math.isnan(v) else (across(at), up(min(max(v, up.low), up.high)))
            for at, v in zip(x, line.values, strict=True)
        ]
        parts.append(svg.path(points, f"line s{number}"))
        if few:
            parts += [
                svg.element(
                    "circle",
                    svg.element("title", f"{escape(line.name)}: {v:.3g}"),
                    class_=f"s{number}",
                    cx=point[0],
                    cy=point[1],
                    r=2.6,
                )
                for point, v in zip(points, line.values, strict=True)
                if point is not None
            ]
    return _figure(chart, parts, [line.name for line in series[:_SERIES]])


def histogram(chart: Chart, edges: Sequence[float], counts: Sequence[float]) -> str:
    """Bars over a logarithmic axis; the first bin includes everything down to zero."""
    positive = [max(edge, _FLOOR) for edge in edges]
    if len(positive) > 2:
        positive[0] = positive[1] ** 2 / positive[2]
    else:
        positive[0] = positive[1] / 10
    across = _across(positive[0], positive[-1], log=True)
    up = svg.Axis(low=0, high=max([*counts, 1]), start=_HEIGHT - _BOTTOM, stop=_TOP)
    shares = [(share * up.high, f"{share * up.high:.0f}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts = [_frame(chart, across, up, _decades(across, 10), shares)]
    for start, end, count in zip(positive, positive[1:], counts, strict=False):
        parts.append(
            svg.element(
                "rect",
                svg.element("title", f"{start:.2g} to {end:.2g}: {count:g}"),
                class_="s0",
                x=across(start),
                y=up(count),
                width=max(0.5, across(end) - across(start) - 1),
                height=up.start - up(count),
            )
        )
    parts += [
        _marker(marker, across(marker.x))
        for marker in chart.markers
        if positive[0] <= marker.x <= positive[-1]
    ]
    return _figure(chart, parts, [])


def _across(low: float, high: float, *, log: bool = False) -> svg.Axis:
    return svg.Axis(low=low, high=high, start=_LEFT, stop=_WIDTH - _RIGHT, log=log)


def _over(values: Sequence[float]) -> svg.Axis:
    """The vertical axis, between powers of ten around all values; zeros are a decade below."""
    positive = [max(value, _FLOOR) for value in values if value > 0]
    low, high = -1, 0
    if positive:
        low = math.floor(math.log10(min(positive))) - (len(positive) < len(values))
        high = max(math.ceil(math.log10(max(positive))), low + 1)
    ends = {"low": 10.0**low, "high": 10.0**high}
    return svg.Axis(**ends, start=_HEIGHT - _BOTTOM, stop=_TOP, log=True)


def _decades(axis: svg.Axis, most: int) -> list[tuple[float, str]]:
    """Ticks at powers of ten."""
    low, high = math.log10(axis.low), math.log10(axis.high)
    exponents = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    stride = max(1, len(exponents) // most)
    return [(10.0**exponent, _power(exponent)) for exponent in exponents[::stride]]


def _power(exponent: int) -> str:
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{superscript}"


def _ticks(axis: svg.Axis) -> list[tuple[float, str]]:
    """Ticks at round numbers."""
    step = svg.round_step((axis.high - axis.low) or 1.0)
    numbers = range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)
    return [(number * step, f"{number * step:g}") for number in numbers]


def _thinned(ticks: list[tuple[float, str]], most: int) -> list[tuple[float, str]]:
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def _frame(
    chart: Chart,
    across: svg.Axis,
    up: svg.Axis,
    x_ticks: list[tuple[float, str]],
    y_ticks: list[tuple[float, str]],
) -> str:
    return svg.axes(across, up, x_ticks, y_ticks, chart.x_label, chart.y_label, columns=False)


def _marker(marker: Marker, x: float) -> str:
    kind = "marker fault" if marker.fault else "marker"
    anchor, offset = ("end", -5) if x > _WIDTH * 0.75 else ("", 5)
    return svg.line(x, _TOP - 18, x, _HEIGHT - _BOTTOM, kind) + svg.text(
        x + offset, _TOP - 8, marker.text, kind, anchor=anchor
    )


def _figure(chart: Chart, parts: Sequence[str], names: Sequence[str]) -> str:
    legend = "".join(
        f'<li><span class="key s{number}"></span>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    listed = f'<ul class="legend">{legend}</ul>' if names else ""
    drawn = svg.element(
        "svg",
        svg.element("title", escape(chart.title)) + "".join(parts),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=chart.title,
    )
    return f'<figure id="{chart.identifier}">{listed}{drawn}</figure>'
