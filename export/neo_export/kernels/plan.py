"""A decode step as a list of launches: what is compiled, and what each launch is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neo_runtime.bundle.step_kernels import Argument, Extent

__all__ = ["POINTER_ALIGNMENT", "Constant", "Planned", "PlannedStep", "Variant"]

Constant = int | float | bool | str
POINTER_ALIGNMENT = 16
"""Bytes, of every address that a kernel is given: what it loads at once."""


@dataclass(frozen=True)
class Variant:
    """A program and what it is compiled for."""

    program: str
    constants: tuple[tuple[str, Constant], ...]
    """By the program's order."""
    types: tuple[str, ...]
    """Of its other arguments."""
    warps: int = 4


@dataclass(frozen=True)
class Planned:
    """A launch of a variant."""

    variant: Variant
    grid: tuple[Extent, Extent, Extent]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class PlannedStep:
    """One decode step of up to `rows` sequences."""

    rows: int
    launches: tuple[Planned, ...]
    memory_bytes: int
    """Of the kernels' own."""
