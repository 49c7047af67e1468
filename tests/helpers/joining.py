"""Checks of sequences that join and leave one cache, as requests do in a running batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from helpers.hf_reference import reference_logits, relative_error, varied_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime import Model
    from numpy.typing import NDArray

ROOM = 3


def assert_rows_join(
    model: Model,
    tolerance: float,
    logits_of: Callable[[list[int]], NDArray[np.float32]] = reference_logits,
) -> None:
    """Rows end and new ones reuse their memory, across the window; compare all with PyTorch.

    Args:
        model: of the demo checkpoint.
        tolerance: the largest relative L2 error of a row of logits.
        logits_of: gives the reference logits, [n, vocab] for n ids.
    """
    new = iter([prompt[:n] for prompt, n in zip(varied_prompts(), LENGTHS, strict=False)])
    with model.new_cache(ROOM, 160) as cache:
        said: list[list[int]] = []
        cache.reorder([])
        for stay, joining in ((0, 1), (1, 2), (2, 1), (1, 2), (0, 2), (2, 1)):
            if said:
                kept = list(range(len(said)))[len(said) - stay :]  # the oldest leave
                cache.reorder(kept)
                said = [said[row] for row in kept]
            cache.extend(joining)
            prompts = [next(new) for _ in range(joining)]
            rows = list(range(stay, stay + joining))
            found = model.prefill(cache, prompts, rows=rows)
            said += prompts
            expected = np.stack([logits_of(ids)[-1] for ids in prompts])
            assert relative_error(found, expected) < tolerance
            for step in range(2):
                tokens = [300 + 17 * step + row for row in range(len(said))]
                found = model.decode(cache, tokens)
                said = [[*ids, token] for ids, token in zip(said, tokens, strict=True)]
                expected = np.stack([logits_of(ids)[-1] for ids in said])
                assert relative_error(found, expected) < tolerance
            assert cache.lengths.tolist() == [len(ids) for ids in said]
        # A later turn of one row leaves the others unchanged.
        found = model.prefill(cache, [[9, 8, 7]], rows=[1])
        said[1] += [9, 8, 7]
        assert relative_error(found, logits_of(said[1])[-1:]) < tolerance
        found = model.decode(cache, [5, 6, 7])
        expected = np.stack(
            [logits_of([*ids, t])[-1] for ids, t in zip(said, (5, 6, 7), strict=True)]
        )
        assert relative_error(found, expected) < tolerance
        # A new sequence needs no prompt: it may start with decode.
        cache.reorder([1, 0])
        cache.extend(1)
        said = [[*said[1], 6], [*said[0], 5]]
        found = model.decode(cache, [8, 9, 11])
        expected = np.stack([logits_of(ids)[-1] for ids in ([*said[0], 8], [*said[1], 9], [11])])
        assert relative_error(found, expected) < tolerance


LENGTHS = (64, 3, 100, 30, 20, 61, 2, 131, 40, 1, 66)
"""Prompt lengths, around the window of 64."""
