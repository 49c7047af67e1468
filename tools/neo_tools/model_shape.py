"""Comparison of the sizes of a checkpoint with those of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_export.checkpoint.config import read_config
from neo_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec

__all__ = ["check_checkpoint", "shape_text"]


def shape_text(model: ModelSpec) -> str:
    """The sizes of a model, in words."""
    return (
        f"{model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size}"
    )


def check_checkpoint(checkpoint: Path, model: ModelSpec) -> None:
    """Refuse a checkpoint whose sizes differ from those of a bundle's model.

    Args:
        checkpoint: a folder, whose `config.json` is read as in export.
        model: the model of the bundle.

    Raises:
        CheckpointError: it is not a checkpoint, or has other sizes.
    """
    found, expected = shape_text(read_config(checkpoint)), shape_text(model)
    if found != expected:
        raise CheckpointError(
            f"{checkpoint} is another model than the bundle: it has {found}; the bundle has "
            f"{expected}; give --model the checkpoint that the bundle was exported from"
        )
