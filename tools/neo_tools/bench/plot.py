"""A roofline plot: the limits of this machine by arithmetic intensity, and the measured rates.

Both axes are logarithmic. A point is one participant in one test: operations per byte (counted, see
`traffic`) and operations per second (measured). Under the slope memory is the limit, under a flat
roof arithmetic is (Williams, Waterman, Patterson, "Roofline", 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_export.reports import svg
from neo_runtime.errors import OutputError, RequestError

from neo_tools.bench.cases import threads_text
from neo_tools.bench.spread import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from neo_tools.bench.results import Limits, Results, Row

__all__ = ["Point", "check_plot", "points_of", "to_svg"]

_WIDTH, _HEIGHT = 960, 560
"""Pixels; the picture is higher if the legend needs it."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 268, 56, 62


@dataclass(frozen=True, kw_only=True)
class Point:
    """One participant in one test."""

    label: str
    test: str
    intensity: float
    """Operations per byte read."""
    rate: float
    """Operations per second."""
    is_decode: bool
    is_peer: bool


def check_plot(path: Path) -> None:
    """Refuse a path that cannot be written, before anything is measured.

    Raises:
        RequestError: the name does not end in .svg.
        OutputError: the folder does not exist.
    """
    if path.suffix.lower() != ".svg":
        raise RequestError(f"--plot {path}: expected a name that ends in .svg")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--plot {path}: the folder {path.absolute().parent} does not exist")


def points_of(results: Results) -> list[Point]:
    """A point for each row. The bytes of a prefill are its weights, read once."""
    found = []
    for row in results.rows:
        read = row.step_bytes or row.weight_bytes
        seconds = percentile(row.round_seconds, 50) / max(1, row.new_tokens)
        found.append(
            Point(
                label=_name(results, row),
                test=row.test if row.batch == 1 else f"{row.test} × {row.batch}",
                intensity=row.flops / read,
                rate=row.flops / seconds,
                is_decode=bool(row.new_tokens),
                is_peer=row.kind == "peer",
            )
        )
    return found


def _name(results: Results, row: Row) -> str:
    return row.label if len(results.limits) == 1 else f"{row.label}, {threads_text(row.threads)}"


def _axes(points: Sequence[Point], limits: Limits) -> tuple[svg.Axis, svg.Axis]:
    """The axes, between powers of ten around the points and the corners of the roof."""
    peaks = list(limits.peak.values())
    xs = [p.intensity for p in points] + [peak / limits.bandwidth for peak in peaks]
    ys = [p.rate for p in points] + peaks
    return (
        svg.Axis(
            low=10.0 ** math.floor(math.log10(min(xs) / 1.5)),
            high=10.0 ** math.ceil(math.log10(max(xs) * 1.5)),
            start=_LEFT,
            stop=_WIDTH - _RIGHT,
            log=True,
        ),
        svg.Axis(
            low=10.0 ** math.floor(math.log10(min(ys) / 1.2)),
            high=10.0 ** math.ceil(math.log10(max(ys) * 1.2)),
            start=_HEIGHT - _BOTTOM,
            stop=_TOP,
            log=True,
        ),
    )


def to_svg(results: Results) -> str:
    """The picture as SVG text.

    Raises:
        RequestError: there is nothing to draw.
    """
    points = points_of(results)
    if not points:
        raise RequestError("no points to draw: the run measured nothing")
    limits = max(results.limits, key=lambda limit: limit.bandwidth)
    x, y = _axes(points, limits)
    title = f"Roofline: {results.machine.cpu}, {threads_text(limits.threads)}"
    peaks = ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in limits.peak.items())
    memory = f"memory {limits.bandwidth / 1e9:.1f} GB/s ({limits.kernel})"
    colors = _colors(points)
    parts = [
        svg.text(_LEFT, 26, title, "title"),
        svg.text(_LEFT, 43, f"{memory}; {peaks}" if peaks else memory),
        svg.axes(
            x,
            y,
            _decades(x, 1.0),
            _decades(y, 1e9),
            "operations a byte read",
            "10⁹ operations a second",
        ),
        *_roof(x, y, limits),
        *(_mark(x, y, point, colors[point.label]) for point in points),
        *_legend(points, colors),
    ]
    lines = 14 * len(points) + 20 * len(colors)
    return svg.document(_WIDTH, max(_HEIGHT, _TOP + lines + 30), title, parts)


def _decades(axis: svg.Axis, unit: float) -> list[tuple[float, str]]:
    """Ticks at powers of ten, as plain numbers of `unit`."""
    powers = range(round(math.log10(axis.low)), round(math.log10(axis.high)) + 1)
    shift = round(math.log10(unit))
    return [(10.0**p, f"{10.0 ** (p - shift):,.{max(0, shift - p)}f}") for p in powers]


def _roof(x: svg.Axis, y: svg.Axis, limits: Limits) -> list[str]:
    """The slope of the memory, and a flat line for each type's peak."""
    peaks = sorted(limits.peak.items(), key=lambda pair: pair[1])
    start = max(x.low, y.low / limits.bandwidth)
    # Without a peak (none is measured on a GPU) the slope continues to the picture's edge.
    top = peaks[-1][1] if peaks else min(y.high, x.high * limits.bandwidth)
    x1, y1, x2, y2 = x(start), y(start * limits.bandwidth), x(top / limits.bandwidth), y(top)
    turn = -math.degrees(math.atan2(y1 - y2, x2 - x1))
    name = ((x1 + 3 * x2) / 4 - 6, (y1 + 3 * y2) / 4 - 8)
    found = [
        svg.line(x1, y1, x2, y2, stroke=svg.INK, stroke_width=2),
        svg.text(*name, "memory", anchor="middle", turn=turn),
    ]
    for kind, peak in peaks:
        corner, height = x(peak / limits.bandwidth), y(peak)
        found.append(svg.line(corner, height, x.stop, height, stroke=svg.INK, stroke_width=2))
        found.append(svg.text(x.stop - 4, height - 6, f"{kind} peak", anchor="end"))
    return found


def _mark(x: svg.Axis, y: svg.Axis, point: Point, color: str) -> str:
    """A circle for decode, a square for prefill; peers' are hollow."""
    words = f"{point.label}, {point.test}: {point.rate / 1e9:.1f} G operations/s"
    shape = {"square": not point.is_decode, "hollow": point.is_peer}
    return svg.mark(x(point.intensity), y(point.rate), color, words, **shape)


def _legend(points: Sequence[Point], colors: dict[str, str]) -> list[str]:
    """The legend: each participant's tests and rates, and the meaning of the shapes."""
    found = []
    x, y = _WIDTH - _RIGHT + 22.0, _TOP + 8.0
    for label, color in colors.items():
        own = [point for point in points if point.label == label]
        shape = {"square": not own[0].is_decode, "hollow": own[0].is_peer}
        found.append(svg.key(x, y, color, label, "name", **shape))
        for point in own:
            y += 14
            found.append(svg.text(x + 18, y, f"{point.test}: {point.rate / 1e9:.1f}", "small"))
        y += 20
    y += 4
    found.append(svg.key(x, y, svg.SOFT, "decode"))
    found.append(svg.key(x + 80, y, svg.SOFT, "prefill", square=True))
    return found


def _colors(points: Sequence[Point]) -> dict[str, str]:
    """A colour for each participant; bundles and peers each start with the first colour."""
    found: dict[str, str] = {}
    for is_peer in (False, True):
        labels = dict.fromkeys(point.label for point in points if point.is_peer == is_peer)
        found |= {label: svg.COLORS[i % len(svg.COLORS)] for i, label in enumerate(labels)}
    return found
