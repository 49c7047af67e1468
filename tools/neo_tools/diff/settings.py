"""What `neo-diff` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_tools.diff.thresholds import Limits

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, and how closely."""

    bundle: Path
    reference: str
    """A checkpoint's folder, a hub id, or another bundle."""
    base: str | None = None
    """The base model of a LoRA adapter; None for the one that the adapter names."""
    text: Path | None = None
    """None for the texts that come with the package."""
    tokens: int = 4096
    context: int | None = None
    """Tokens of a context; None for as many as the bundle has positions."""
    decode_positions: int | None = 32
    """Of each context; None for all."""
    prefill_chunk: int = 512
    localize_tokens: int = 2048
    """Tokens of the contexts whose places are looked at: at least one context is; 0 for none."""
    continuations: int = 4
    """Greedy texts that are compared."""
    new_tokens: int = 32
    """Of each greedy text."""
    backend: str = "auto"
    """What runs the bundle: `neo_runtime.load`'s."""
    device: int = 0
    """Which GPU."""
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
