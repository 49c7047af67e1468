"""Compares a loaded model with PyTorch, in the calls that a service makes, on any backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from helpers.models import random_ids
from helpers.running import assert_agrees

if TYPE_CHECKING:
    from helpers.models import Reference, TinyConfig
    from neo_runtime.model import Model

_STEPS = 4


def assert_parity(model: Model, reference: Reference, config: TinyConfig, limit: float) -> None:
    """Score, prefill and decode across the window and to the last position, and ragged rows."""
    ids = random_ids(config, 3, config.max_position_embeddings)
    expected = reference.logits(ids)
    for row in range(len(ids)):
        assert_agrees(model.logits(ids[row])[None], expected[row : row + 1], limit)
    for prompt in _prompts(config):
        with model.new_cache(1, ids.shape[1]) as cache:
            found = [model.prefill(cache, [ids[0, :prompt]]).copy()]
            stop = min(prompt + _STEPS, ids.shape[1])
            found += [model.decode(cache, [ids[0, n]]).copy() for n in range(prompt, stop)]
        assert_agrees(np.stack(found, axis=1), expected[:1, prompt - 1 : stop], limit)
    _assert_ragged_rows(model, ids, expected, limit)


def _prompts(config: TinyConfig) -> list[int]:
    """Lengths around the window, and ones that end at the last position."""
    end, window = config.max_position_embeddings, config.window_size
    return sorted({n for n in (1, window - 1, window, window + 1, end - _STEPS) if 0 < n < end})


def _assert_ragged_rows(
    model: Model,
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    expected: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    limit: float,
) -> None:
    """Prompts of three lengths, a later turn, a step; then two rows swap and one leaves."""
    end = ids.shape[1]
    counts = np.array([1, end // 2, end - 5])
    rows = np.arange(3)
    with model.new_cache(3, end) as cache:
        found = model.prefill(cache, [ids[row, : counts[row]] for row in rows])
        assert_agrees(found[:, None], expected[rows, counts - 1][:, None], limit)
        found = model.prefill(cache, [ids[row, counts[row] : counts[row] + 2] for row in rows])
        counts = counts + 2
        assert_agrees(found[:, None], expected[rows, counts - 1][:, None], limit)
        for order in ([0, 1, 2], [2, 0]):
            cache.reorder(order)
            rows, counts = rows[order], counts[order]
            found = model.decode(cache, ids[rows, counts])
            assert_agrees(found[:, None], expected[rows, counts][:, None], limit)
            counts = counts + 1
