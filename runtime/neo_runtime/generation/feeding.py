"""Which tokens the model computes next: one per row, or several where they are already known.

A grammar often leaves no choice: after `{"` a schema may require `name": "`. Such forced tokens are
emitted at once. They are computed in one call of the model where that is faster than one decode
step for each.
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
"""Several tokens of a row are computed in one extra call only if there are at least this many per
row of the batch: all rows wait for the call, which takes one to two steps, and only this row saves
its share of later steps."""


def feed(model: CachedModel, cache: KVCache, rows: Sequence[Row], most: int) -> StepLogits:
    """Append the next `unfed` tokens of each row to the cache.

    Args:
        model: computes the logits.
        cache: the cache of these rows.
        rows: each has at least one token in `unfed`.
        most: most tokens to compute in one call beside the decode step.

    Returns:
        Logits after the last token fed to each row. A row whose `unfed` is not empty afterwards
        has emitted more tokens than these logits cover.
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
