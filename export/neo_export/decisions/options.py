"""What is asked of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_export.targets import Quantization

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["ExportOptions"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint."""

    base: str | None = None
    """The base model of a LoRA adapter; None for the one that the adapter names."""
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
    """A folder that keeps what these statistics were used for, for the next export."""
    verify: bool = False
    """Compare numbers with PyTorch before the bundle is put in place."""
    force: bool = False
    """Replace a bundle that is there."""
