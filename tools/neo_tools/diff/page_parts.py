"""Pieces of the page: sections, tables, numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["number", "section", "table"]


def section(title: str, *parts: str) -> str:
    """A section with a heading around HTML."""
    anchor = f"section-{title.lower().replace(' ', '-')}"
    inside = f'<h2 id="{anchor}">{title}</h2>{"".join(parts)}'
    return f'<section aria-labelledby="{anchor}">{inside}</section>'


def table(identifier: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML already, and the first of a row is the row's heading."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table id="{identifier}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def number(value: float) -> str:
    """A number with three digits, as in the plain-text report."""
    return "not finite" if not math.isfinite(value) else f"{value:.3g}"
