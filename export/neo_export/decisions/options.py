"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_export.targets import Quantization

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["ExportOptions"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of an export."""

    base: str | None = None
    """The base model of a LoRA adapter; None for the one that the adapter names."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None for the checkpoint's own."""
    target: str = "cpu"
    precision: str = "fp32"
    quantization: Quantization = field(default_factory=Quantization)
    max_length: int | None = None
    """Largest number of positions in a sequence; None for all that the checkpoint has."""
    kv_cache: str = "float"
    """How keys and values are stored: one of `CACHE_FORMATS`."""
    calibration: Path | None = None
    """Folder with the checkpoint's statistics from `neo-calibrate`."""
    remembered: Path | None = None
    """A folder that caches results computed from these statistics, for the next export."""
    verify: bool = False
    """Compare numbers with PyTorch before the bundle is put in place."""
    force: bool = False
    """Replace an existing bundle."""
