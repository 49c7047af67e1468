"""The settings of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_tools.diff.thresholds import Limits

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a comparison."""

    bundle: Path
    reference: str
    """A checkpoint's folder, a hub id, or another bundle."""
    base: str | None = None
    """The base model of a LoRA adapter; None for the one that the adapter names."""
    text: Path | None = None
    """File with texts; None for those that come with the package."""
    tokens: int = 4096
    context: int | None = None
    """Tokens per context; None for as many as the bundle has positions."""
    decode_positions: int | None = 32
    """Positions of each context that go through decode; None for all."""
    prefill_chunk: int = 512
    localize_tokens: int = 2048
    """Number of tokens in contexts whose places are compared (at least one context); 0 for none."""
    continuations: int = 4
    """Number of greedy texts that are compared."""
    new_tokens: int = 32
    """New tokens of each greedy text."""
    backend: str = "auto"
    """Backend of the bundle, as in `neo_runtime.load`."""
    device: int = 0
    """Number of the GPU."""
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
