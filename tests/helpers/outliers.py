"""The same function with a few channels far larger than the rest: what large models are like.

The outputs of a layer norm are scaled up in some channels, and the columns of the products that
read them scaled down by as much. In float32 nothing changes (the factor is a power of two unless
told otherwise); a scale that channels share now serves the few at the cost of the many.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

READERS = {
    "ln_1": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
    "ln_2": ("mlp.c_fc",),
}
"""Norm of a layer → the products that read it."""


def outlier_checkpoint(
    source: Path, folder: Path, *, factor: float = 50.0, channels: int = 4, seed: int = 0
) -> Path:
    """Copy a checkpoint with `channels` channels of every layer's norms × `factor`.

    The final norm stays: its reader is the tied table, which the embedding reads as well.
    """
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    generator = np.random.default_rng(seed)
    norms = [name for name in tensors if name.endswith((".ln_1.weight", ".ln_2.weight"))]
    for name in sorted(norms):
        norm = name.removesuffix(".weight")
        layer, kind = norm.rsplit(".", 1)
        large = generator.choice(len(tensors[name]), channels, replace=False)
        for part in ("weight", "bias"):
            tensors[f"{norm}.{part}"][large] *= factor
        for reader in READERS[kind]:
            tensors[f"{layer}.{reader}.weight"][:, large] /= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
