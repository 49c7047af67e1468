"""Whether a checkpoint and a bundle, or two bundles, are the same model, as far as sizes tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_export.checkpoint.config import read_config
from neo_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

__all__ = ["check_checkpoint", "shape_text"]


def shape_text(model: ModelSpec) -> str:
    """The sizes, in words."""
    return (
        f"{model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size}"
    )


def check_checkpoint(checkpoint: Path, model: ModelSpec) -> None:
    """Refuse a checkpoint that a bundle of `model` was not exported from.

    Args:
        checkpoint: a folder whose `config.json` is read as the exporter does.
        model: the bundle's.

    Raises:
        CheckpointError: it is no checkpoint, or another model.
    """
    found, expected = shape_text(read_config(checkpoint)), shape_text(model)
    if found != expected:
        raise CheckpointError(
            f"{checkpoint} is another model than the bundle: it has {found}; the bundle has "
            f"{expected}; name with --model the checkpoint that the bundle was exported from"
        )
