"""The raw findings of a comparison, from which the summary is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from neo_export.comparison.errors import PlaceErrors
    from neo_export.comparison.faults import Fault
    from numpy.typing import NDArray

    from neo_tools.diff.position_metrics import PositionMetrics

__all__ = ["Findings", "Written"]


@dataclass(frozen=True)
class Written:
    """A prompt and the bundle's greedy continuation."""

    context: int
    prompt: int
    """Number of tokens of the prompt."""
    ids: NDArray[np.int64]
    """[prompt + new]."""


@dataclass
class Findings:
    """Arrays from which `results.Results` is made."""

    metrics: dict[str, PositionMetrics]
    """Metrics by graph."""
    errors: PlaceErrors
    faults: list[Fault]
    localized_tokens: int
    written: list[Written]
    best_of_reference: list[NDArray[np.int64]]
    """The reference's best token after each position of each of `written`."""
    warnings: list[str] = field(default_factory=list)
