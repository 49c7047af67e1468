"""Plots as inline SVG, coloured by the page's own style sheet: light and dark alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Chart", "Line", "Marker", "histogram", "lines"]

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 26, 44
_SERIES = 8
"""Colours that the style sheet has: classes s0 to s7."""
_FLOOR = 1e-12
"""What a logarithmic axis shows of zero."""


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
    """What all plots have."""

    identifier: str
    title: str
    """For readers who cannot see it."""
    x_label: str
    y_label: str
    markers: tuple[Marker, ...] = ()


def lines(
    chart: Chart, x: Sequence[float], series: Sequence[Line], labels: Sequence[str] | None = None
) -> str:
    """Lines over a logarithmic axis.

    Args:
        chart: its frame.
        x: of each value.
        series: at most eight.
        labels: under each x; by default numbers at round distances.
    """
    found = [v for line in series for v in line.values if v is not None and math.isfinite(v)]
    scale = _Scale.over(found)
    low, high = min(x), max(x)
    span = (high - low) or 1.0

    def across(value: float) -> float:
        return _LEFT + (value - low) / span * (_WIDTH - _LEFT - _RIGHT)

    parts = [scale.grid()]
    ticks = _ticks(low, high) if labels is None else list(x)
    names = [f"{tick:g}" for tick in ticks] if labels is None else list(labels)
    parts += _x_axis([across(tick) for tick in ticks], names)
    parts += [_marker(marker, across(marker.x)) for marker in chart.markers]
    few = len(x) <= 60
    for number, line in enumerate(series[:_SERIES]):
        points = [
            None if v is None or math.isnan(v) else (across(at), scale.y(v))
            for at, v in zip(x, line.values, strict=True)
        ]
        parts.append(_polyline(points, number))
        if few:
            parts += [
                f'<circle class="s{number}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.6">'
                f"<title>{escape(line.name)}: {v:.3g}</title></circle>"
                for p, v in zip(points, line.values, strict=True)
                if p is not None
            ]
    return _figure(chart, parts, [line.name for line in series[:_SERIES]])


def histogram(chart: Chart, edges: Sequence[float], counts: Sequence[float]) -> str:
    """Bars over a logarithmic axis; the first bin takes everything down to zero."""
    positive = [max(edge, _FLOOR) for edge in edges]
    if len(positive) > 2:
        positive[0] = positive[1] ** 2 / positive[2]
    else:
        positive[0] = positive[1] / 10
    low, high = math.log10(positive[0]), math.log10(positive[-1])
    top = max([*counts, 1])

    def across(value: float) -> float:
        share = (math.log10(value) - low) / ((high - low) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(_grid_line(y, f"{share * top:.0f}"))
    exponents = range(math.ceil(low), math.floor(high) + 1)
    stride = max(1, len(exponents) // 10)
    parts += _x_axis(
        [across(10.0**e) for e in exponents[::stride]], [_power(e) for e in exponents[::stride]]
    )
    for start, end, count in zip(positive, positive[1:], counts, strict=False):
        height = count / top * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(
            f'<rect class="s0" x="{across(start):.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
            f'width="{max(0.5, across(end) - across(start) - 1):.1f}" height="{height:.1f}">'
            f"<title>{start:.2g} to {end:.2g}: {count:g}</title></rect>"
        )
    parts += [
        _marker(marker, across(marker.x))
        for marker in chart.markers
        if positive[0] <= marker.x <= positive[-1]
    ]
    return _figure(chart, parts, [])


@dataclass(frozen=True)
class _Scale:
    """Powers of ten at both ends of the vertical axis."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Sequence[float]) -> _Scale:
        """Round all values out to powers of ten; zeros lie a decade below the rest."""
        positive = [value for value in values if value > 0]
        if not positive:
            return cls(-1, 0)
        low = math.floor(math.log10(max(min(positive), _FLOOR)))
        if len(positive) < len(values):
            low -= 1
        return cls(low, max(math.ceil(math.log10(max(*positive, _FLOOR))), low + 1))

    def y(self, value: float) -> float:
        if math.isinf(value):
            return _TOP
        exponent = math.log10(value) if value > 0 else self.low
        share = (max(exponent, self.low) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> str:
        stride = max(1, (self.high - self.low) // 6)
        return "".join(
            _grid_line(self.y(10.0**e), _power(e)) for e in range(self.low, self.high + 1, stride)
        )


def _power(exponent: int) -> str:
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{superscript}"


def _grid_line(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _x_axis(places: Sequence[float], names: Sequence[str]) -> list[str]:
    y = _HEIGHT - _BOTTOM
    stride = max(1, math.ceil(len(places) / 26))
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    parts += [
        f'<text class="tick" x="{x:.1f}" y="{y + 17}" text-anchor="middle">{escape(name)}</text>'
        for x, name in list(zip(places, names, strict=True))[::stride]
    ]
    return parts


def _marker(marker: Marker, x: float) -> str:
    kind = "marker fault" if marker.fault else "marker"
    right = x > _WIDTH * 0.75
    anchor, offset = ("end", -5) if right else ("start", 5)
    ends = f'y1="{_TOP - 18}" y2="{_HEIGHT - _BOTTOM}"'
    return (
        f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
        f'<text class="{kind}" x="{x + offset:.1f}" y="{_TOP - 8}" text-anchor="{anchor}">'
        f"{escape(marker.text)}</text>"
    )


def _polyline(points: Sequence[tuple[float, float] | None], number: int) -> str:
    """A path that breaks at gaps."""
    path, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        path.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return f'<path class="line s{number}" d="{" ".join(path)}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from one end to the other."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= 8:
            step *= factor
            break
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(chart: Chart, parts: Sequence[str], names: Sequence[str]) -> str:
    legend = "".join(
        f'<li><span class="key s{number}"></span>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    listed = f'<ul class="legend">{legend}</ul>' if names else ""
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    return (
        f'<figure id="{chart.identifier}">{listed}'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title)}"><title>{escape(chart.title)}</title>'
        + "".join(parts)
        + f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>'
        f'<text class="label" transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(chart.y_label)}</text></svg></figure>'
    )
