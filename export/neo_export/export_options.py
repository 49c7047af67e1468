"""What is asked of an export, and what is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_export.targets import Quantization

if TYPE_CHECKING:
    from pathlib import Path

    from neo_export.built_graphs import GraphSummary
    from neo_export.half_range import WideTensor
    from neo_export.quantize.migration_search import MovedPlace
    from neo_export.verify import Verification

__all__ = ["ExportOptions", "ExportSummary"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint."""

    target: str = "cpu"
    precision: str = "fp32"
    quantization: Quantization = field(default_factory=Quantization)
    max_length: int | None = None
    """Positions a sequence may have; None for all that the checkpoint has."""
    kv_cache: str = "float"
    """How keys and values are kept: one of `CACHE_FORMATS`."""
    calibration: Path | None = None
    """Statistics of the checkpoint, which `neo-calibrate` wrote."""
    remembered: Path | None = None
    """A folder that keeps matrices quantized with these statistics for the next export."""
    verify: bool = False
    """Compare numbers with PyTorch before the bundle is put in place."""
    force: bool = False
    """Replace a bundle that is there."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export did."""

    bundle: str
    digest: str
    target: str
    precision: str
    max_length: int
    cache_layout: str
    parameters: int
    weight_bytes: int
    total_bytes: int
    graphs: tuple[GraphSummary, ...]
    seconds: float
    peak_rss_bytes: int
    """Largest resident memory, mapped files included."""
    peak_private_bytes: int
    """Largest private (anonymous) memory: RssAnon."""
    verification: Verification | None
    moved_places: tuple[MovedPlace, ...] = ()
    """Where activation outliers were moved into the weights."""
    kept_wide: tuple[WideTensor, ...] = ()
    """What stays float32 in a float16 bundle, and why."""
    largest_score: float = 0.0
    """The largest unscaled q·k of a float16 bundle, where it is near the end of float16: attention
    is in standard operators then, with float32 scores."""
