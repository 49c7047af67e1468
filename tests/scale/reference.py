"""PyTorch's logits of one text, computed once and kept on disk. Runs as a process of its own.

The whole model is in its memory, and gone before ours is loaded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import random_ids
from .comparison import relative_l2

if TYPE_CHECKING:
    from numpy.typing import NDArray


def compute(checkpoint: Path, ids_file: Path, logits_file: Path) -> dict[str, Any]:
    """Write token ids [n] and their logits, float32 [n, vocabulary], n the model's last position.

    Returns:
        Facts about the run, among them how far the logits would be off with a window that is one
        position too long (a check that cannot see that would be no check), and how far PyTorch's
        own float16 is off.
    """
    import torch
    import transformers
    from transformers import GPTNeoForCausalLM

    started = time.perf_counter()
    model: Any = GPTNeoForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    )
    model.eval()
    loaded = time.perf_counter()
    config = model.config
    ids = random_ids(config.vocab_size, config.max_position_embeddings)
    logits = _logits(model, ids)
    computed = time.perf_counter()
    np.save(ids_file, ids)
    np.save(logits_file, logits)
    window = config.window_size
    _set_window(model, window + 1)
    end = min(len(ids), window + 8)
    wrong = relative_l2(_logits(model, ids[:end]), logits[:end])
    _set_window(model, window)
    few = min(len(ids), 2 * window + 32)
    half = relative_l2(_logits(model.half(), ids[:few]), logits[:few])
    return {
        "tokens": len(ids),
        "window_size": window,
        "load_seconds": loaded - started,
        "forward_seconds": computed - loaded,
        "wrong_window_error": float(wrong[window:].max()),
        "half_tokens": few,
        "half_error": float(half.max()),
        "half_error_median": float(np.median(half)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        found: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return found


def _set_window(model: Any, window: int) -> None:
    """Rebuild the masks of the local layers."""
    import torch

    for block in model.transformer.h:
        attention = block.attn.attention
        if block.attn.attention_type == "local":
            size = attention.bias.shape[-1]
            causal = torch.ones((size, size), dtype=torch.bool).tril()
            attention.bias = (causal ^ causal.tril(-window)).view(1, 1, size, size)


def main() -> None:
    """`python -m tests.scale.reference CHECKPOINT --ids F --logits F --output JSON`."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale.reference", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    facts = compute(arguments.checkpoint, arguments.ids, arguments.logits)
    arguments.output.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
