"""Plots as SVG text, without a plotting library: axes, ticks, lines, markers, legends.

Common elements have a class (`grid`, `axis`, `tick`, `label`), so that a page's style sheet can
style them; `document` includes its own style. Coordinates are pixels from the top left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "COLORS",
    "INK",
    "SOFT",
    "Axis",
    "axes",
    "document",
    "element",
    "key",
    "line",
    "mark",
    "path",
    "round_step",
    "text",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#332288")
"""Six of Okabe and Ito's colours, which colour-blind readers can tell apart, and two more."""
INK, SOFT = "#222222", "#666666"
_STYLE = f"""
text {{ font: 12px Helvetica, Arial, "DejaVu Sans", sans-serif; fill: {SOFT}; }}
.title {{ font-size: 15px; font-weight: 600; fill: {INK}; }}
.name {{ font-weight: 600; fill: {INK}; }}
.label {{ fill: {INK}; }}
.small {{ font-size: 11px; }}
.grid {{ stroke: #E2E2E2; }}
"""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to pixels along one axis."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    stop: float
    """Pixel of `high`."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value, which must be positive on a logarithmic axis."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log10(number) for number in (low, high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.stop - self.start)


def round_step(span: float, most: int = 8) -> float:
    """The smallest 1, 2 or 5 times a power of ten that fits into `span` at most `most` times."""
    least = span / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """An XML element; `content` is markup, not escaped.

    Attributes are escaped, floats rounded to tenths. In names a trailing underscore is dropped and
    others become hyphens (`class_`, `stroke_width`). Attributes that are "" are omitted.
    """
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value != ""
    )
    return f"<{name}{listed}>{content}</{name}>" if content else f"<{name}{listed}/>"


def _attribute(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))


def text(
    x: float, y: float, words: str, kind: str = "", *, anchor: str = "", turn: float = 0.0
) -> str:
    """Text of a class (`title`, `name`, `label`, `tick`, `small`), rotated by `turn` degrees."""
    turned = f"rotate({turn:.1f} {x:.1f} {y:.1f})" if turn else ""
    place = {"x": float(x), "y": float(y), "text_anchor": anchor, "transform": turned}
    return element("text", escape(words), class_=kind, **place) if words else ""


def line(
    x1: float, y1: float, x2: float, y2: float, kind: str = "", /, **attributes: object
) -> str:
    """A straight line with a class, attributes, or both."""
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", class_=kind, **ends, **attributes)


def path(points: Iterable[tuple[float, float] | None], kind: str, **attributes: object) -> str:
    """Straight segments from point to point; None is a gap."""
    steps, pen = [], "M"
    for point in points:
        if point is not None:
            steps.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "M" if point is None else "L"
    return element("path", class_=kind, d=" ".join(steps), **attributes)


def mark(
    x: float, y: float, color: str, words: str = "", *, square: bool = False, hollow: bool = False
) -> str:
    """A circle or square centred on a point; `words` are its tooltip."""
    fill, stroke = ("white", color) if hollow else (color, "white")
    style = {"fill": fill, "stroke": stroke, "stroke_width": 2 if hollow else 1.2}
    title = element("title", escape(words)) if words else ""
    if square:
        return element("rect", title, x=x - 5.0, y=y - 5.0, width=10, height=10, **style)
    return element("circle", title, cx=float(x), cy=float(y), r=5.5, **style)


def key(
    x: float,
    y: float,
    color: str,
    words: str,
    kind: str = "",
    /,
    *,
    square: bool = False,
    hollow: bool = False,
) -> str:
    """A legend entry: a marker and its label."""
    sign = mark(x + 5, y - 4, color, square=square, hollow=hollow)
    return sign + text(x + 18, y, words, kind)


def axes(
    x: Axis,
    y: Axis,
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Iterable[tuple[float, str]],
    x_label: str,
    y_label: str,
    *,
    columns: bool = True,
) -> str:
    """Grid lines, tick labels and axis labels.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        x_ticks: values and their labels.
        y_ticks: values and their labels.
        x_label: label below the plot.
        y_label: label on the left, rotated.
        columns: draw vertical grid lines too; False: only the horizontal axis.
    """
    parts = []
    for value, words in y_ticks:
        parts.append(line(x.start, y(value), x.stop, y(value), "grid"))
        parts.append(text(x.start - 8, y(value) + 4, words, "tick", anchor="end"))
    for value, words in x_ticks:
        if columns:
            parts.append(line(x(value), y.start, x(value), y.stop, "grid"))
        parts.append(text(x(value), y.start + 18, words, "tick", anchor="middle"))
    if not columns:
        parts.append(line(x.start, y.start, x.stop, y.start, "axis"))
    across, up = (x.start + x.stop) / 2, (y.start + y.stop) / 2
    parts.append(text(across, y.start + 38, x_label, "label", anchor="middle"))
    parts.append(text(x.start - 52, up, y_label, "label", anchor="middle", turn=-90))
    return "".join(parts)


def document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A complete SVG file: style sheet, white background, and `title` as the document's title."""
    body = [
        element("title", escape(title)),
        element("style", _STYLE),
        element("rect", width=width, height=height, fill="white"),
        *parts,
    ]
    return (
        element(
            "svg",
            "\n".join(["", *body, ""]),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            role="img",
        )
        + "\n"
    )
