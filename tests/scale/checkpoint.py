"""A GPT-Neo checkpoint of a published size with seeded random weights, written as a stream.

The published weights are a download of gigabytes, and their values change neither how long a graph
takes nor what memory it needs. Names, shapes and dtype here are those of the published checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

__all__ = ["SIZES", "random_ids", "write_checkpoint"]

SIZES = {"125m": (768, 12, 12), "1.3b": (2048, 24, 16), "2.7b": (2560, 32, 20)}
"""Width, layers and heads of EleutherAI/gpt-neo-125M, -1.3B and -2.7B."""

_VOCABULARY = 50257
_POSITIONS = 2048
_WINDOW = 256
_ROWS = 4096
"""Rows that are drawn and written at once: bounds the memory."""


def write_checkpoint(
    folder: Path, size: str, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Path:
    """Write `config.json` and `model.safetensors` (float32) into `folder`, or find them there.

    The configuration is written last: a folder that has one is complete.

    Args:
        folder: created where it is missing.
        size: one of `SIZES`.
        seed: of the values; each tensor draws from a generator of its own.
        progress: called with a line of text now and then.

    Returns:
        `folder`.
    """
    width, layers, heads = SIZES[size]
    tensors = dict(_tensors(width, layers))
    header = _header(tensors, seed)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if config.is_file() and weights.is_file() and _starts_with(weights, header):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config.unlink(missing_ok=True)
    with weights.open("wb") as stream:
        stream.write(header)
        for index, (name, shape) in enumerate(tensors.items()):
            generator = np.random.default_rng([seed, index])
            spread, mean = _spread(name, layers)
            for start in range(0, shape[0], _ROWS):
                part = (min(_ROWS, shape[0] - start), *shape[1:])
                values = generator.standard_normal(part, dtype=np.float32)
                stream.write((np.float32(mean) + np.float32(spread) * values).tobytes())
            if progress is not None and index % 60 == 0:
                progress(f"checkpoint: {index} of {len(tensors)} tensors")
    text = json.dumps(_config(width, layers, heads), indent=2) + "\n"
    config.write_text(text, encoding="utf-8")
    return folder


def _tensors(width: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of computation."""
    yield "transformer.wte.weight", (_VOCABULARY, width)
    yield "transformer.wpe.weight", (_POSITIONS, width)
    for layer in range(layers):
        block = {
            **_norm("ln_1", width),
            **{f"attn.attention.{part}_proj.weight": (width, width) for part in "kvq"},
            **_linear("attn.attention.out_proj", width, width),
            **_norm("ln_2", width),
            **_linear("mlp.c_fc", width, 4 * width),
            **_linear("mlp.c_proj", 4 * width, width),
        }
        for name, shape in block.items():
            yield f"transformer.h.{layer}.{name}", shape
    for name, shape in _norm("ln_f", width).items():
        yield f"transformer.{name}", shape


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _spread(name: str, layers: int) -> tuple[float, float]:
    """Standard deviation and mean: GPT-2's initialization, but biases and norms vary as well.

    A term that an exporter forgot would not show where it is all zeros, or ones.
    """
    place = name.split(".")[-2]
    if name.endswith(".bias"):
        return 0.05, 0.0
    if place.startswith("ln_"):
        return 0.1, 1.0
    if place in ("out_proj", "c_proj"):
        return 0.02 / math.sqrt(2 * layers), 0.0
    return 0.02, 0.0


def _starts_with(file: Path, header: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(header)) == header


def _header(tensors: dict[str, tuple[int, ...]], seed: int) -> bytes:
    """The first bytes of a safetensors file: a length, and where each tensor lies."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "seed": str(seed)}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _config(width: int, layers: int, heads: int) -> dict[str, object]:
    kinds = ["global", "local"]
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPTNeoForCausalLM"],
        "attention_dropout": 0,
        "attention_layers": kinds * (layers // 2),
        "attention_types": [[kinds, layers // 2]],
        "bos_token_id": 50256,
        "embed_dropout": 0,
        "eos_token_id": 50256,
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": _POSITIONS,
        "model_type": "gpt_neo",
        "num_heads": heads,
        "num_layers": layers,
        "resid_dropout": 0,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": _VOCABULARY,
        "window_size": _WINDOW,
    }


def random_ids(vocab_size: int, count: int, seed: int = 7) -> NDArray[np.int64]:
    """Seeded token ids, int64 [count]: they need no tokenizer, and reach any row of the table."""
    return np.random.default_rng(seed).integers(0, vocab_size, count, dtype=np.int64)


def main() -> None:
    """`python -m tests.scale.checkpoint SIZE FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale.checkpoint", description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.size, arguments.seed, print)


if __name__ == "__main__":
    main()
