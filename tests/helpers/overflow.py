"""Checkpoints that are correct in float32 but overflow or underflow in float16."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

Tensors = dict[str, "NDArray[np.float32]"]


def overflowing(
    source: Path, folder: Path, *changes: Callable[[Tensors, dict[str, object]], None]
) -> Path:
    """Copy a checkpoint and apply a change to its tensors and config."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for change in changes:
        change(tensors, config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _twins(tensors: Tensors, config: dict[str, object], bias: float, row: float) -> None:
    """Add two units to the MLP of layer 1 that have equal inputs and cancel."""
    prefix = "transformer.h.1.mlp"
    generator = np.random.default_rng(0)
    hidden = tensors[f"{prefix}.c_fc.weight"].shape[1]
    into = generator.normal(size=hidden) * row / hidden**0.5
    column = generator.normal(size=(hidden, 1)) * 1e-6
    added = {
        "c_fc.weight": (np.array([into, into]), 0),
        "c_fc.bias": (np.array([bias, bias]), 0),
        "c_proj.weight": (np.concatenate([column, -column], axis=1), 1),
    }
    for name, (values, axis) in added.items():
        old = tensors[f"{prefix}.{name}"]
        tensors[f"{prefix}.{name}"] = np.concatenate([old, values.astype(np.float32)], axis=axis)
    # All layers have the same width: the new units of the others are silent.
    for layer in range(len(config["attention_layers"])):  # type: ignore[arg-type]
        if layer != 1:
            other = f"transformer.h.{layer}.mlp"
            for name, (values, axis) in added.items():
                old = tensors[f"{other}.{name}"]
                silent = np.zeros_like(values, np.float32)
                tensors[f"{other}.{name}"] = np.concatenate([old, silent], axis=axis)
    config["intermediate_size"] = len(tensors[f"{prefix}.c_fc.bias"])


def large_units(tensors: Tensors, config: dict[str, object]) -> None:
    """Weights fit in float16, but outputs of the activation do not."""
    _twins(tensors, config, 60000.0, 20000.0)


def large_weight(tensors: Tensors, config: dict[str, object]) -> None:
    """A bias exceeds the range of float16."""
    _twins(tensors, config, 90000.0, 1.0)


def large_residual(tensors: Tensors, config: dict[str, object]) -> None:
    """The residual stream × 2¹³, which norms cancel (except for their epsilon)."""
    factor = np.float32(2.0**13)
    for name in tensors:
        if name.endswith(("wte.weight", "wpe.weight")) or ".out_proj." in name or "c_proj" in name:
            tensors[name] *= factor
    for part in ("weight", "bias"):  # the tied table is also the head
        tensors[f"transformer.ln_f.{part}"] /= factor


def small_norm(tensors: Tensors, config: dict[str, object]) -> None:
    """Norm of layer 1's MLP ÷ 2²³, in float16's subnormal range; c_fc × 2¹⁵, c_proj × 2⁸.

    The activation is then nearly linear, and its contribution keeps its size.
    """
    for name, power in (
        ("ln_2.weight", -23),
        ("ln_2.bias", -23),
        ("mlp.c_fc.weight", 15),
        ("mlp.c_fc.bias", -8),
        ("mlp.c_proj.weight", 8),
    ):
        tensors[f"transformer.h.1.{name}"] *= np.float32(2.0**power)


def large_scores(tensors: Tensors, config: dict[str, object]) -> None:
    """Add 270² to every score of layer 0, which softmax cancels.

    The last channel of ln_1 is constant, and the first channel of each head's queries and keys
    is 270 times it.
    """
    prefix, heads = "transformer.h.0", int(str(config["num_heads"]))
    tensors[f"{prefix}.ln_1.weight"][-1] = 0
    tensors[f"{prefix}.ln_1.bias"][-1] = 1
    for part in "qkv":
        weight = tensors[f"{prefix}.attn.attention.{part}_proj.weight"]
        weight[:, -1] = 0
        if part != "v":
            first = np.arange(heads) * (len(weight) // heads)
            weight[first] = 0
            weight[first, -1] = 270
