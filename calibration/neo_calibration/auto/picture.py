"""The trade-off as an SVG: bytes of the weight file against KL divergence, no library needed."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_calibration.auto.report import Point

__all__ = ["to_svg"]

_WIDTH, _HEIGHT = 760, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 190, 46, 58
_COLORS = {"auto": "#0072B2", "calibrated": "#009E73", "rounded": "#D55E00"}
"""Okabe and Ito's, which colour-blind readers can tell apart; shapes differ as well."""
_NAMES = {
    "auto": "--auto, calibrated",
    "calibrated": "all alike, calibrated",
    "rounded": "all alike, rounded",
}
_INK, _SOFT, _GRID = "#222222", "#666666", "#E2E2E2"


class _Axes:
    """Megabytes (linear) and nats (logarithmic) to pixels."""

    def __init__(self, points: Sequence[Point]) -> None:
        sizes = [point.size / 1e6 for point in points]
        values = [edge for point in points for edge in (point.interval or (point.divergence,) * 2)]
        self.step = _nice((max(sizes) - min(sizes) or max(sizes)) / 8)
        self.left = self.step * math.floor(min(sizes) / self.step - 1e-9)
        self.right = self.step * math.ceil(max(sizes) / self.step + 1e-9)
        around = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        marks = [factor * 10.0**power for power in around for factor in (1, 2, 5)]
        first = max(i for i, mark in enumerate(marks) if mark <= min(values))
        last = min(i for i, mark in enumerate(marks) if mark >= max(values))
        self.marks = marks[first : max(last, first + 1) + 1]
        """Values of the grid's horizontal lines, from the lowest on."""

    def x(self, size: float) -> float:
        share = (size / 1e6 - self.left) / (self.right - self.left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = math.log(value / self.marks[0]) / math.log(self.marks[-1] / self.marks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def to_svg(points: Sequence[Point], title: str) -> str:
    """Draw all points but exact ones, whose divergence is 0.

    A line joins what a search would answer: of plans and calibrated bundles with all matrices alike
    those that none of as few bytes is as good as.
    """
    drawn = [point for point in points if point.divergence > 0]
    axes = _Axes(drawn)
    path = " ".join(
        f"{axes.x(p.size):.1f},{axes.y(p.divergence):.1f}" for p in _pareto_optimal(drawn)
    )
    body = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 26, title, size=15, weight="600"),
        *_grid(axes),
        f'<polyline points="{path}" fill="none" stroke="{_COLORS["auto"]}" stroke-width="1.5"/>',
        *(_mark(axes, point) for point in drawn),
        *_legend([kind for kind in _COLORS if any(p.kind == kind for p in drawn)]),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        f"<title>{escape(title)}</title>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _pareto_optimal(points: Sequence[Point]) -> list[Point]:
    """By rising size."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.divergence)):
        if point.kind != "rounded" and (not best or point.divergence < best[-1].divergence):
            best.append(point)
    return best


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


def _grid(axes: _Axes) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    found = []
    for number in range(round(axes.left / axes.step), round(axes.right / axes.step) + 1):
        x = axes.x(number * axes.step * 1e6)
        found.append(_line(x, _TOP, x, bottom))
        found.append(_text(x, bottom + 18, f"{number * axes.step:g}", anchor="middle"))
    for mark in axes.marks:
        y = axes.y(mark)
        found.append(_line(_LEFT, y, right, y))
        found.append(_text(_LEFT - 8, y + 4, f"{mark:g}", anchor="end"))
    found.append(_text((_LEFT + right) / 2, _HEIGHT - 16, "weights.bin, MB", anchor="middle"))
    up = (_TOP + bottom) / 2
    found.append(
        f'<g transform="rotate(-90 22 {up:.1f})">'
        + _text(22, up, "KL divergence from float32, nats", anchor="middle")
        + "</g>"
    )
    return found


def _mark(axes: _Axes, point: Point) -> str:
    x, y, color = axes.x(point.size), axes.y(point.divergence), _COLORS[point.kind]
    low, high = (axes.y(edge) for edge in (point.interval or (point.divergence,) * 2))
    label = (
        ""
        if point.kind == "auto" and point.name != "chosen"
        else _text(x + 8, y - 6, point.name, size=11)
    )
    title = f"{point.name}: {point.size / 1e6:.3f} MB, {point.divergence:.3g} nats"
    return (
        f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{color}"/>'
        f"{_shape(x, y, point.kind)}<title>{escape(title)}</title></g>{label}"
    )


def _shape(x: float, y: float, kind: str) -> str:
    color = _COLORS[kind]
    if kind == "auto":
        return f'<g><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
    fill = color if kind == "calibrated" else "white"
    return (
        f'<g><rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{fill}" '
        f'stroke="{color}" stroke-width="2"/>'
    )


def _legend(kinds: Sequence[str]) -> list[str]:
    x, found = _WIDTH - _RIGHT + 18, []
    for row, kind in enumerate(kinds):
        y = _TOP + 14 + 22 * row
        found += [_shape(x, y - 4, kind) + "</g>", _text(x + 14, y, _NAMES[kind])]
    found.append(_text(x, _TOP + 26 + 22 * len(kinds), "bars: 95 % intervals", size=11))
    return found


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_GRID}"/>'


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: str = "400"
) -> str:
    color = _INK if weight != "400" else _SOFT
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
    )
