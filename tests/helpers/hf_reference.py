"""The demo checkpoint in transformers, the reference of the runtime's tests."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from helpers.models import DEMO, Reference
from helpers.running import relative_l2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@cache
def demo_reference() -> Reference:
    """The demo checkpoint in PyTorch."""
    return Reference(DEMO)


@cache
def heldout_texts() -> list[str]:
    lines = (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@cache
def varied_prompts(count: int = 20) -> list[list[int]]:
    """Token ids of held-out texts, cut to five lengths around the window of 64, in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = [text for text in heldout_texts() if len(text) > 800][:count]
    lengths = (64, 3, 131, 30, 188)
    return [tokenizer.encode(text)[: lengths[i % 5]] for i, text in enumerate(texts)]


def reference_logits(ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits at every position, float32 [n, vocab]."""
    return demo_reference().logits(np.array([list(ids)]))[0]


def reference_continuations(
    prompts: Sequence[Sequence[int]], **options: Any
) -> list[list[tuple[int, ...]]]:
    """The ids that transformers' `generate` appends, `num_return_sequences` lists per prompt.

    Prompts of one length go through `generate` together, which needs no padding. The padding
    behind finished sequences is taken off.
    """
    import torch

    found: dict[int, list[tuple[int, ...]]] = {}
    for length in {len(prompt) for prompt in prompts}:
        places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[i]) for i in places])
        with torch.no_grad():
            output = demo_reference().model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=-1, **options
            )
        rows = [tuple(t for t in row if t >= 0) for row in output[:, length:].tolist()]
        each = len(rows) // len(places)
        found |= {place: rows[n * each : (n + 1) * each] for n, place in enumerate(places)}
    return [found[i] for i in range(len(prompts))]


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest relative L2 error over the rows of logits."""
    return float(relative_l2(found, expected).max())
