"""Logits in float64, straight from the formulas: how far float32 itself is off.

Neither PyTorch nor a graph takes part. GPT-Neo's scores are not scaled by 1/√d, so where they are
large, softmax turns a rounding of the scores into a relative error of the weights that is as many
times larger. What is left between PyTorch and float64 is what no float32 program can be held to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from neo_export.checkpoint.folder import open_checkpoint

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

__all__ = ["exact_logits"]

_ROWS = 4096
"""Rows of the embedding table that are in float64 at once."""


def exact_logits(checkpoint: Path, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Token ids [n] → logits of the next token, float64 [n, vocabulary]; gelu_new, tied head."""
    with open_checkpoint(checkpoint) as opened:
        tensors, spec = opened.tensors, opened.spec

        def read(name: str) -> NDArray[np.float64]:
            return tensors[f"transformer.{name}"].read().astype(np.float64)

        def norm(hidden: NDArray[np.float64], name: str) -> NDArray[np.float64]:
            centred = hidden - hidden.mean(axis=-1, keepdims=True)
            variance = (centred**2).mean(axis=-1, keepdims=True)
            scaled = centred / np.sqrt(variance + spec.layer_norm_epsilon)
            result: NDArray[np.float64] = scaled * read(f"{name}.weight") + read(f"{name}.bias")
            return result

        def linear(hidden: NDArray[np.float64], name: str, *, bias: bool) -> NDArray[np.float64]:
            product = hidden @ read(f"{name}.weight").T
            return product + read(f"{name}.bias") if bias else product

        table = tensors["transformer.wte.weight"].read()
        hidden = table[ids].astype(np.float64) + read("wpe.weight")[: len(ids)]
        for layer, kind in enumerate(spec.attention_layers):
            block = f"h.{layer}"
            normed = norm(hidden, f"{block}.ln_1")
            projected = [
                linear(normed, f"{block}.attn.attention.{part}_proj", bias=False) for part in "qkv"
            ]
            mixed = _attention(*projected, spec=spec, local=kind == "local")
            hidden = hidden + linear(mixed, f"{block}.attn.attention.out_proj", bias=True)
            normed = norm(hidden, f"{block}.ln_2")
            inner = _gelu_new(linear(normed, f"{block}.mlp.c_fc", bias=True))
            hidden = hidden + linear(inner, f"{block}.mlp.c_proj", bias=True)
        final = norm(hidden, "ln_f")
    parts = [
        final @ table[start : start + _ROWS].astype(np.float64).T
        for start in range(0, len(table), _ROWS)
    ]
    return np.concatenate(parts, axis=-1)


def _attention(
    query: NDArray[np.float64],
    key: NDArray[np.float64],
    value: NDArray[np.float64],
    *,
    spec: ModelSpec,
    local: bool,
) -> NDArray[np.float64]:
    """Causal attention of [n, width], head by head; not scaled."""
    distance = np.arange(len(query))[:, None] - np.arange(len(query))
    visible = (distance >= 0) & ((distance < spec.window_size) | (not local))
    mixed = np.empty_like(query)
    for head in range(spec.num_heads):
        own = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
        scores = np.where(visible, query[:, own] @ key[:, own].T, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[:, own] = weights / weights.sum(axis=-1, keepdims=True) @ value[:, own]
    return mixed


def _gelu_new(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    )
    return result


def main() -> None:
    """`python -m tests.scale.exact CHECKPOINT --ids F --length N --output NPY`."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale.exact", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    ids = np.load(arguments.ids)[: arguments.length]
    np.save(arguments.output, exact_logits(arguments.checkpoint, ids))


if __name__ == "__main__":
    main()
