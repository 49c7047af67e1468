"""Checks of the prefix cache: sequences that start with blocks computed for other sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from helpers.hf_reference import reference_logits, relative_error, varied_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime import Model
    from neo_runtime.cache.prefix_cache import PrefixCache
    from numpy.typing import NDArray

LENGTHS = (31, 32, 33, 65, 80, 97, 129, 160, 161)
"""Lengths of shared prefixes: around blocks of 32, the window of 64, and its CPU cache of 80."""
ROOM = 8 * 10**6
"""Bytes, more than these tests use."""


def assert_beginnings_hold(
    model: Model,
    tolerance: float,
    logits_of: Callable[[list[int]], NDArray[np.float32]] = reference_logits,
) -> None:
    """Continue blocks of other sequences in rows of one cache; compare every step with PyTorch.

    Args:
        model: of the demo checkpoint, with room for 3 sequences.
        tolerance: the largest relative L2 error of a row of logits.
        logits_of: what they are compared with, [n, vocab] for n ids.
    """
    ids = [token for prompt in varied_prompts(5) for token in prompt]
    with model.new_prefix_cache(ROOM) as prefixes:
        _read(model, prefixes, ids[:180])
        for number, length in enumerate(LENGTHS):
            said = [
                ids[310:315],
                ids[:length] + ids[200:207],
                ids[:length] + ids[300 + number :][:3],
            ]
            expected = np.stack([logits_of(one)[-1] for one in said[1:]])
            with model.new_cache(3, 250) as cache:
                cache.reorder([0])
                model.prefill(cache, [said[0]])  # an existing row
                cache.extend(2)
                rest = []
                for row in (1, 2):
                    found = prefixes.find(np.array(said[row]))
                    assert found.length == length // 32 * 32
                    found.load(cache, row)
                    assert cache.lengths[row] == found.length
                    rest.append(said[row][found.length :])
                logits = model.prefill(cache, rest, rows=[1, 2])
                assert relative_error(logits, expected) < tolerance, length
                for step in range(20):
                    tokens = [400 + step, 500 + step, 600 + step]
                    logits = model.decode(cache, tokens)
                    said = [[*one, token] for one, token in zip(said, tokens, strict=True)]
            expected = np.stack([logits_of(one)[-1] for one in said])
            assert relative_error(logits, expected) < tolerance, length


def _read(model: Model, prefixes: PrefixCache, ids: list[int]) -> None:
    """Compute a prompt and its answer beside another row, as a scheduler does, and cache them."""
    told = prefixes.find(np.array(ids))
    assert not told.length
    prompt = len(ids) - 60
    with model.new_cache(2, 250) as cache:
        for start in range(0, prompt, prefixes.chunk):
            chunk = ids[start : min(start + prefixes.chunk, prompt)]
            model.prefill(cache, [[5], chunk])
            told.extend(np.array(ids[: start + len(chunk)]), cache, 1)
        for index in range(prompt, len(ids)):
            model.decode(cache, [7, ids[index]])
            told.extend(np.array(ids[: index + 1]), cache, 1)
