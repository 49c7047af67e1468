"""Checks of `crop`: sequences that drop positions and continue differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from helpers.hf_reference import reference_logits, relative_error, varied_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime import Model
    from numpy.typing import NDArray

LENGTHS = (1, 30, 62, 63, 64, 65, 78, 79, 80, 81, 95, 96, 97, 98, 140)
"""Lengths to crop to: around the window of 64, its CPU cache of 80, and evictions."""


def assert_crops_hold(
    model: Model,
    tolerance: float,
    logits_of: Callable[[list[int]], NDArray[np.float32]] = reference_logits,
) -> None:
    """Score wrong tokens, crop them, then add others; compare every step with PyTorch.

    Args:
        model: of the demo checkpoint, with room for 3 sequences.
        tolerance: the largest relative L2 error of a row of logits.
        logits_of: what they are compared with, [n, vocab] for n ids.
    """
    ids = [token for prompt in varied_prompts(5) for token in prompt]
    cropped = 0
    for start in LENGTHS:
        with model.new_cache(1, 160) as cache:
            model.prefill(cache, [ids[:start]])
            said = ids[:start]
            for turn in range(3):
                room = min(cache.room_to_crop, 5)
                wrong = [700 + turn + place for place in range(room)]
                if wrong:
                    found = model.logits(wrong, cache)
                    expected = logits_of(said + wrong)[len(said) :]
                    assert relative_error(found, expected) < tolerance, (start, turn)
                    cropped += 1
                cache.crop(len(said) + min(turn, room))
                said = said + wrong[: min(turn, room)]
                assert cache.lengths.tolist() == [len(said)]
                found = model.decode(cache, [300 + turn])
                said = [*said, 300 + turn]
                assert relative_error(found, logits_of(said)[-1:]) < tolerance, (start, turn)
            found = model.logits(ids[:7], cache)  # across an eviction: appending always fits
            expected = logits_of(said + ids[:7])[len(said) :]
            assert relative_error(found, expected) < tolerance, start
    assert cropped > 2 * len(LENGTHS)
    with model.new_cache(2, 160) as cache:
        model.prefill(cache, [ids[:40], ids[50:53]])
        cache.crop(20)  # nothing has been written after it yet
        found = model.decode(cache, [5, 6])
        expected = np.stack([logits_of([*ids[:20], 5])[-1], logits_of([*ids[50:53], 6])[-1]])
        assert relative_error(found, expected) < tolerance
    with model.new_cache(3, 160) as cache:
        rows = [ids[:30], ids[40:110], ids[60:65]]
        model.prefill(cache, rows)
        model.decode(cache, [5, 6, 7])
        cache.crop(31)
        rows = [[*rows[0], 5], rows[1][:31], [*rows[2], 7]]
        assert cache.lengths.tolist() == [31, 31, 6]
        found = model.decode(cache, [8, 9, 11])
        rows = [[*row, token] for row, token in zip(rows, (8, 9, 11), strict=True)]
        expected = np.stack([logits_of(row)[-1] for row in rows])
        assert relative_error(found, expected) < tolerance
        cache.crop(0)
        assert cache.lengths.tolist() == [0, 0, 0]
        found = model.prefill(cache, rows)
        assert relative_error(found, expected) < tolerance
