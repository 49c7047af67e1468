"""The generation loop: prefill once, then one token per row and step until every row has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.generation.feeding import feed
from neo_runtime.generation.rows import Stopwatch
from neo_runtime.text.prompts import named_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from neo_runtime.backends.step_logits import RowLogits, StepLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.rows import Row
    from neo_runtime.generation.text_stream import Piece

__all__ = ["fill_holes", "never", "read_prompts", "steps"]


def never() -> bool:
    """The default of `should_stop`."""
    return False


def steps(
    model: CachedModel,
    cache: KVCache,
    groups: Sequence[Sequence[Row]],
    should_stop: Callable[[], bool],
    prompts: int = 1,
) -> Generator[list[Piece], None, None]:
    """Continue all rows together; each step yields the pieces of the rows still active.

    Rows that have ended leave the batch.

    Args:
        model: computes the logits.
        cache: an empty cache for all rows.
        groups: the rows of each prompt, equally many for each.
        should_stop: called after each step; once it returns true, the active rows end as
            "cancelled".
        prompts: number of prompts in the request; with several, errors name the prompt.
    """
    rows = [row for group in groups for row in group]
    if any(row.total > len(row.prompt) + 1 for row in rows):
        model.prepare()  # before the clocks start; decode is not needed for one token
    logits = read_prompts(model, cache, groups)
    while True:
        yield [_advanced(row, scores, prompts) for row, scores in zip(rows, logits, strict=True)]
        active = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if not active:
            return
        if should_stop():
            yield [rows[index].cancel() for index in active]
            return
        if len(active) < len(rows):
            active = fill_holes(active)
            cache.reorder(active)
            rows = [rows[index] for index in active]
        logits = feed(model, cache, rows, model.prefill_chunk)


def _advanced(row: Row, scores: RowLogits, prompts: int) -> Piece:
    with named_prompt(row.index, prompts):
        return row.advance(scores)


def read_prompts(model: CachedModel, cache: KVCache, groups: Sequence[Sequence[Row]]) -> StepLogits:
    """Start the rows' clocks and prefill the prompts after their prefix; see `steps`."""
    rows = [row for group in groups for row in group]
    for row in rows:
        row.watch = Stopwatch()
    cache.reorder(range(len(groups)))
    if (prefix := rows[0].prefix) is not None:
        prefix.fill(cache, range(len(groups)))
    logits = model.prefill_step(cache, [row.unread_prompt for [row, *_] in groups])
    copies = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    if len(copies) > len(groups):
        cache.reorder(copies)
        logits = logits.take(copies)
    for row in rows:
        row.watch.prefill = row.watch.seconds()
    return logits


def fill_holes(active: Sequence[int]) -> list[int]:
    """An order of the active rows that moves as few as possible, so that little is copied."""
    count = len(active)
    staying = {index for index in active if index < count}
    moving = iter([index for index in active if index >= count])
    return [index if index in staying else next(moving) for index in range(count)]
