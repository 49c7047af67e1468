"""A roofline picture: what arithmetic intensity allows on this machine, and what was reached.

Both axes are logarithmic. A point is one participant in one test: operations a byte (counted, see
`traffic`) and operations a second (measured). Under the slope memory is the limit, under a flat
roof arithmetic is (Williams, Waterman, Patterson, "Roofline", 2009).

The SVG is written by hand, without a library; a PNG needs matplotlib.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError, OutputError, RequestError

from neo_tools.bench.cases import threads_text
from neo_tools.bench.statistics import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from neo_tools.bench.results import Limits, Results, Row

__all__ = ["Point", "check_plot", "points_of", "to_svg", "write_plot"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#332288")
"""Okabe and Ito's, which colour-blind readers can tell apart, and two more. Bundles and peers
begin with the first of them each: peers' marks are hollow."""
_INK, _SOFT, _GRID = "#222222", "#666666", "#E2E2E2"
_WIDTH, _HEIGHT = 960, 560
"""Pixels; the picture gets higher where the legend needs it."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 268, 56, 62


@dataclass(frozen=True, kw_only=True)
class Point:
    """One participant in one test."""

    label: str
    test: str
    intensity: float
    """Operations a byte read."""
    rate: float
    """Operations a second."""
    is_decode: bool
    is_peer: bool


def check_plot(path: Path) -> None:
    """Refuse what could not be written, before anything is measured.

    Raises:
        RequestError: neither .svg nor .png.
        DependencyError: .png without matplotlib.
        OutputError: the folder is not there.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise RequestError(f"--plot {path}: expected a name that ends in .svg or .png")
    if path.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise DependencyError(
            "a .png needs matplotlib, which is not installed: pip install matplotlib, or name a "
            ".svg, which needs nothing"
        )
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--plot {path}: the folder {path.absolute().parent} does not exist")


def write_plot(results: Results, path: Path) -> None:
    """Write the picture of a run.

    Raises:
        OSError: it cannot be written.
    """
    if path.suffix.lower() == ".svg":
        path.write_text(to_svg(results), encoding="utf-8")
    else:
        _write_png(results, path)


def points_of(results: Results) -> list[Point]:
    """A point for each row. A prefill's bytes are its weights, read once, as a decode step's."""
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


@dataclass(frozen=True)
class _Axes:
    """Powers of ten at the ends of both axes, and the way to pixels."""

    left: int
    right: int
    bottom: int
    top: int

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.left) / (self.right - self.left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.bottom) / (self.top - self.bottom)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _axes(points: Sequence[Point], limits: Limits) -> _Axes:
    """Wide enough for the points and the corners of the roof."""
    peaks = list(limits.peak.values())
    xs = [p.intensity for p in points] + [peak / limits.bandwidth for peak in peaks]
    ys = [p.rate for p in points] + peaks
    return _Axes(
        left=math.floor(math.log10(min(xs) / 1.5)),
        right=math.ceil(math.log10(max(xs) * 1.5)),
        bottom=math.floor(math.log10(min(ys) / 1.2)),
        top=math.ceil(math.log10(max(ys) * 1.2)),
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
    axes = _axes(points, limits)
    title = f"Roofline: {results.machine.cpu}, {threads_text(limits.threads)}"
    body = [
        _text(_LEFT, 26, title, size=15, weight="600"),
        _text(
            _LEFT,
            43,
            f"memory {limits.bandwidth / 1e9:.1f} GB/s ({limits.kernel}); "
            + ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in limits.peak.items()),
            color=_SOFT,
        ),
        *_grid(axes),
        *_roof(axes, limits),
        *_marks(axes, points),
    ]
    lines = 14 * len(points) + 20 * len(_colors(points))
    height = max(_HEIGHT, _TOP + lines + 30)
    body.insert(0, f'<rect width="{_WIDTH}" height="{height}" fill="white"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        f"<title>{escape(title)}</title>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    color: str = _INK,
    anchor: str = "start",
    weight: str = "400",
    turn: float = 0.0,
) -> str:
    place = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}" font-weight="{weight}"{place}>{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str, style: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {style}/>'
    )


def _grid(axes: _Axes) -> list[str]:
    """Lines at powers of ten, their numbers, and what the axes are."""
    found = []
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for power in range(axes.left, axes.right + 1):
        x = axes.x(10.0**power)
        found.append(_line(x, _TOP, x, bottom, _GRID))
        found.append(_text(x, bottom + 18, _decimal(power), color=_SOFT, anchor="middle"))
    for power in range(axes.bottom, axes.top + 1):
        y = axes.y(10.0**power)
        found.append(_line(_LEFT, y, right, y, _GRID))
        found.append(_text(_LEFT - 8, y + 4, _decimal(power - 9), color=_SOFT, anchor="end"))
    middle = (_LEFT + right) / 2
    found.append(_text(middle, _HEIGHT - 18, "operations a byte read", anchor="middle"))
    up = (_TOP + bottom) / 2
    found.append(_text(24, up, "10⁹ operations a second", anchor="middle", turn=-90))
    return found


def _decimal(power: int) -> str:
    return f"{10.0**power:,.{max(0, -power)}f}"


def _roof(axes: _Axes, limits: Limits) -> list[str]:
    """The slope of the memory, and a flat line for each type's peak."""
    found = []
    peaks = sorted(limits.peak.items(), key=lambda pair: pair[1])
    start = max(10.0**axes.left, 10.0**axes.bottom / limits.bandwidth)
    # Without a peak (none is measured on a GPU) the slope goes on to the picture's edge.
    top = peaks[-1][1] if peaks else min(10.0**axes.top, 10.0**axes.right * limits.bandwidth)
    corner = top / limits.bandwidth
    style = 'stroke-width="2"'
    x1, y1 = axes.x(start), axes.y(start * limits.bandwidth)
    x2, y2 = axes.x(corner), axes.y(top)
    found.append(_line(x1, y1, x2, y2, _INK, style))
    turn = -math.degrees(math.atan2(y1 - y2, x2 - x1))
    x, y = (x1 + 3 * x2) / 4, (y1 + 3 * y2) / 4
    found.append(_text(x - 6, y - 8, "memory", anchor="middle", turn=turn, color=_SOFT))
    right = _WIDTH - _RIGHT
    for name, peak in peaks:
        y = axes.y(peak)
        found.append(_line(axes.x(peak / limits.bandwidth), y, right, y, _INK, style))
        found.append(_text(right - 4, y - 6, f"{name} peak", anchor="end", color=_SOFT))
    return found


def _marks(axes: _Axes, points: Sequence[Point]) -> list[str]:
    """Circles for decode, squares for prefill; a legend with everyone's tests and rates."""
    colors = _colors(points)
    found = []
    for point in points:
        place = (axes.x(point.intensity), axes.y(point.rate))
        found.append(_mark(*place, colors[point.label], point))
    x, y = _WIDTH - _RIGHT + 22.0, _TOP + 8.0
    for label, color in colors.items():
        own = [point for point in points if point.label == label]
        found += [_mark(x + 5, y - 4, color, own[0]), _text(x + 18, y, label, weight="600")]
        for point in own:
            y += 14
            text = f"{point.test}: {point.rate / 1e9:.1f}"
            found.append(_text(x + 18, y, text, size=11, color=_SOFT))
        y += 20
    y += 4
    for text, is_decode in (("decode", True), ("prefill", False)):
        shape = Point(label=text, test="", intensity=1, rate=1, is_decode=is_decode, is_peer=False)
        found += [_mark(x + 5, y - 4, _SOFT, shape), _text(x + 18, y, text, color=_SOFT)]
        x += 80
    return found


def _colors(points: Sequence[Point]) -> dict[str, str]:
    """A colour a participant, in the order of the points."""
    found: dict[str, str] = {}
    for is_peer in (False, True):
        labels = dict.fromkeys(point.label for point in points if point.is_peer == is_peer)
        found |= {label: _COLORS[i % len(_COLORS)] for i, label in enumerate(labels)}
    return found


def _mark(x: float, y: float, color: str, point: Point) -> str:
    name = f"{point.label}, {point.test}: {point.rate / 1e9:.1f} G operations/s"
    fill, stroke = ("white", color) if point.is_peer else (color, "white")
    style = f'fill="{fill}" stroke="{stroke}" stroke-width="{2 if point.is_peer else 1.2}"'
    shape = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" {style}>'
        if point.is_decode
        else f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" {style}>'
    )
    return f"{shape}<title>{escape(name)}</title></{'circle' if point.is_decode else 'rect'}>"


def _write_png(results: Results, path: Path) -> None:
    """The same picture with matplotlib."""
    import matplotlib  # type: ignore[import-not-found,import-untyped,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,import-untyped,unused-ignore]

    points = points_of(results)
    limits = max(results.limits, key=lambda limit: limit.bandwidth)
    axes = _axes(points, limits)
    figure, plane = pyplot.subplots(figsize=(9.6, 5.6), layout="constrained")
    ends = (10.0**axes.left, 10.0**axes.right)
    if not limits.peak:
        plane.plot(ends, [x * limits.bandwidth / 1e9 for x in ends], color=_INK)
    for name, peak in limits.peak.items():
        corner = peak / limits.bandwidth
        xs = (ends[0], corner, ends[1])
        plane.plot(xs, [min(peak, x * limits.bandwidth) / 1e9 for x in xs], color=_INK)
        plane.annotate(f"{name} peak", (ends[1], peak / 1e9), ha="right", va="bottom")
    colors = _colors(points)
    for point in points:
        plane.plot(
            point.intensity,
            point.rate / 1e9,
            "o" if point.is_decode else "s",
            color=colors[point.label],
            markerfacecolor="white" if point.is_peer else colors[point.label],
            linestyle="none",
            label=f"{point.label}, {point.test}",
        )
    plane.set(xscale="log", yscale="log", xlim=ends)
    plane.set(xlabel="operations a byte read", ylabel="10⁹ operations a second")
    plane.set_title(f"Roofline: {results.machine.cpu}, {threads_text(limits.threads)}")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
