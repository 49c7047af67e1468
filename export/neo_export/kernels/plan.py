"""A decode step as a list of launches: what to compile, and the arguments of each launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neo_runtime.bundle.step_kernels import Argument, Extent

__all__ = ["POINTER_ALIGNMENT", "Constant", "Planned", "PlannedStep", "Variant"]

Constant = int | float | bool | str
POINTER_ALIGNMENT = 16
"""In bytes, of every pointer argument: kernels are compiled for loads of 16 bytes."""


@dataclass(frozen=True)
class Variant:
    """A program with the constants and argument types it is compiled for."""

    program: str
    constants: tuple[tuple[str, Constant], ...]
    """Names and values of the `tl.constexpr` parameters."""
    types: tuple[str, ...]
    """Triton types of the other parameters, in order."""
    warps: int = 4


@dataclass(frozen=True)
class Planned:
    """One launch of a variant."""

    variant: Variant
    grid: tuple[Extent, Extent, Extent]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class PlannedStep:
    """One decode step of up to `rows` sequences."""

    rows: int
    launches: tuple[Planned, ...]
    memory_bytes: int
    """Size of the kernels' own memory."""
