"""Checkpoints of the same function with outlier channels, as large models have.

Some output channels of a layer norm are scaled up, and the columns of the products that read them
scaled down by the same factor. In float32 nothing changes (the factor is a power of two by
default), but a quantization scale that all channels share now fits only the few outliers.
"""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

READERS = {
    "ln_1": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
    "ln_2": ("mlp.c_fc",),
}
"""Norm of a layer → the products that read it."""


def outlier_checkpoint(
    source: Path, folder: Path, *, factor: float = 50.0, channels: int = 4, seed: int = 0
) -> Path:
    """Copy a checkpoint with `channels` channels of every layer's norms × `factor`.

    The final norm is unchanged: the tied table reads it, and also serves as the embedding.
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


def spread_outliers(source: Path, folder: Path, seed: int = 0) -> Path:
    """Copy a checkpoint as the same function with outliers at the input of every product.

    Rescaling channels cannot restore the original, and every layer has different channels:

    - norms: some channels × 8 to 100, drawn log-uniformly; their readers' columns ÷ the same;
    - values: each head's values are rotated at random, and some rotated channels scaled; out_proj
      undoes both;
    - after the activation: units are added in pairs. Twins respond to the text alike, on top of
      different large biases (where gelu_new(x) = x), and have opposite columns in c_proj: their
      large contributions cancel. Other pairs are silent, and spike on a few tokens.
    """
    shutil.copytree(source, folder)
    tensors = {n: t.astype(np.float64) for n, t in load_file(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    generator = np.random.default_rng(seed)
    for layer in range(config["num_layers"]):
        prefix = f"transformer.h.{layer}."
        _scale_norms(tensors, prefix, generator)
        _turn_values(tensors, prefix, config["num_heads"], generator)
        inner = _add_units(tensors, prefix, generator)
    config["intermediate_size"] = inner
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    narrow = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(narrow, folder / "model.safetensors", {"format": "pt"})
    return folder


def _factors(generator: np.random.Generator, width: int, channels: int) -> NDArray[np.float64]:
    """A factor per channel: 1, or for some channels 8 to 100."""
    factors = np.ones(width)
    large = generator.choice(width, channels, replace=False)
    factors[large] = np.exp(generator.uniform(math.log(8), math.log(100), channels))
    return factors


def _scale_norms(
    tensors: dict[str, NDArray[np.float64]], prefix: str, generator: np.random.Generator
) -> None:
    for norm, readers in READERS.items():
        factors = _factors(generator, len(tensors[f"{prefix}{norm}.weight"]), 8)
        for part in ("weight", "bias"):
            tensors[f"{prefix}{norm}.{part}"] *= factors
        for reader in readers:
            tensors[f"{prefix}{reader}.weight"] /= factors


def _turn_values(
    tensors: dict[str, NDArray[np.float64]], prefix: str, heads: int, generator: np.random.Generator
) -> None:
    values, out = (f"{prefix}attn.attention.{part}_proj.weight" for part in ("v", "out"))
    size = len(tensors[values]) // heads
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        rotation = np.linalg.qr(generator.normal(size=(size, size)))[0]
        factors = _factors(generator, size, 2)
        tensors[values][rows] = factors[:, None] * (rotation @ tensors[values][rows])
        tensors[out][:, rows] = tensors[out][:, rows] @ rotation.T / factors


def _add_units(
    tensors: dict[str, NDArray[np.float64]], prefix: str, generator: np.random.Generator
) -> int:
    """Returns the new width."""
    into, out = f"{prefix}mlp.c_fc", f"{prefix}mlp.c_proj"
    hidden = tensors[f"{into}.weight"].shape[1]
    scale = np.abs(tensors[f"{prefix}ln_2.weight"])
    rows, biases, columns = [], [], []
    for twin in (True, True, True, True, False, False, False, False):
        row = generator.normal(size=hidden) / scale / math.sqrt(hidden)
        column = generator.normal(size=hidden) * 0.3 * tensors[f"{out}.weight"].std()
        bias = math.exp(generator.uniform(math.log(30), math.log(300)))
        if twin:
            rows += [row, row]
            biases += [bias, bias / 2]
            tensors[f"{out}.bias"] -= column * bias / 2
        else:
            rows += [row * bias, row * bias]
            biases += [-2.5 * bias, -2.5 * bias]
        columns += [column, -column]
    tensors[f"{into}.weight"] = np.concatenate([tensors[f"{into}.weight"], np.array(rows)])
    tensors[f"{into}.bias"] = np.concatenate([tensors[f"{into}.bias"], np.array(biases)])
    tensors[f"{out}.weight"] = np.concatenate(
        [tensors[f"{out}.weight"], np.array(columns).T], axis=1
    )
    return len(tensors[f"{into}.bias"])


def constant_checkpoint(source: Path, folder: Path, value: float, channel: int = 5) -> Path:
    """The same function with a large constant in a channel of each `ln_2`, which a bias cancels."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".ln_2.bias")]:
        reader = name.replace("ln_2.bias", "mlp.c_fc")
        tensors[name][channel] += value
        column = tensors[f"{reader}.weight"][:, channel].astype(np.float64)
        tensors[f"{reader}.bias"] -= (value * column).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
