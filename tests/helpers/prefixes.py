"""Checks of sequences whose prefix is copied from another cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from helpers.hf_reference import reference_logits, relative_error, varied_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime import Model
    from numpy.typing import NDArray

LENGTHS = (1, 30, 63, 64, 65, 79, 80, 81, 96, 97, 140)
"""Prefix lengths: around the window of 64, its CPU cache of 80, and multiples of 16."""


def assert_prefixes_hold(
    model: Model,
    tolerance: float,
    logits_of: Callable[[list[int]], NDArray[np.float32]] = reference_logits,
) -> None:
    """Continue different prefixes in rows of one cache; compare every step with PyTorch.

    Args:
        model: of the demo checkpoint, with room for 3 sequences.
        tolerance: the largest relative L2 error of a row of logits.
        logits_of: gives the reference logits, [n, vocab] for n ids.
    """
    ids = [token for prompt in varied_prompts(5) for token in prompt]
    for number, length in enumerate(LENGTHS):
        rest = [ids[200 + number :][: 1 + 13 * (number % 3)], ids[300:303], ids[310:315]]
        with model.prefix(ids[:length]) as prefix, model.new_cache(3, 200) as cache:
            cache.reorder([0])
            model.prefill(cache, [rest[2]])  # an existing row
            cache.extend(2)
            prefix.fill(cache, [1, 2])
            assert cache.lengths.tolist() == [len(rest[2]), length, length]
            found = model.prefill(cache, rest[:2], rows=[1, 2])
            said = [rest[2], ids[:length] + rest[0], ids[:length] + rest[1]]
            expected = np.stack([logits_of(one)[-1] for one in said[1:]])
            assert relative_error(found, expected) < tolerance, length
            for step in range(20):
                tokens = [400 + step, 500 + step, 600 + step]
                found = model.decode(cache, tokens)
                said = [[*one, token] for one, token in zip(said, tokens, strict=True)]
            expected = np.stack([logits_of(one)[-1] for one in said])
            assert relative_error(found, expected) < tolerance, length
        with model.prefix(ids[:length]) as prefix, model.new_cache(2, 200) as cache:
            prefix.fill(cache, [1, 0])
            found = model.decode(cache, [7, 8])  # without a prompt in between
            expected = np.stack([logits_of([*ids[:length], token])[-1] for token in (7, 8)])
            assert relative_error(found, expected) < tolerance, length
