"""Which tokens of which rows the model computes next: one of each, or several where they are known.

A grammar often leaves no choice: behind `{"` a schema may want `name": "`. Such tokens are said at
once, and computed in one run over the weights where that is sooner than a step for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.rows import Row

__all__ = ["feed"]

_STEPS = 2
"""A row runs ahead for so many tokens for each row of the batch, at least: all wait for a run that
takes as long as one to two steps, and only this row saves its share of later ones."""


def feed(model: CachedModel, cache: KVCache, rows: Sequence[Row], most: int) -> StepLogits:
    """Compute what is next of tokens that were said.

    Args:
        model: computes.
        cache: of these rows.
        rows: each with a token to be fed, or more.
        most: tokens that one call may compute beside a step.

    Returns:
        Logits behind what each row was fed, which is not all that it has said while it has `unfed`.
    """
    if len(rows) == 1:
        tokens = rows[0].next_tokens(most)
        if len(tokens) > 1:
            return model.prefill_step(cache, [tokens])
        return model.decode_step(cache, tokens)
    ahead = {}
    for index, row in enumerate(rows):
        count = min(len(row.unfed) - 1, most)
        if count >= _STEPS * len(rows):
            ahead[index] = row.next_tokens(count)
            most -= count
    if ahead:
        model.prefill_step(cache, list(ahead.values()), list(ahead))
    return model.decode_step(cache, [row.next_tokens(1)[0] for row in rows])
