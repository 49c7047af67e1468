"""The bundle as it ships: logits of every position, through each of its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_export.mapped_memory import scratch_array

from neo_tools.diff.cached_path import spoil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime import Model
    from numpy.typing import NDArray

    from neo_tools.diff.cached_path import Segment

__all__ = ["Logits", "greedy_continuation", "score_logits", "stepwise_logits"]


@dataclass(frozen=True)
class Logits:
    """What one graph gave at some positions of one text."""

    graph: str
    positions: NDArray[np.int64]
    """[n]"""
    values: NDArray[np.float32]
    """[n, V]; large ones lie in a file."""


def score_logits(model: Model, ids: NDArray[np.int64]) -> Logits:
    """Every position, in one call."""
    values = scratch_array((len(ids), model.manifest.model.vocab_size), "float32")
    values[:] = model.logits(ids)
    return Logits("score", np.arange(len(ids), dtype=np.int64), values)


def stepwise_logits(
    model: Model,
    ids: NDArray[np.int64],
    segments: Sequence[Segment],
    step: Callable[[int], None] = lambda tokens: None,
) -> list[Logits]:
    """Through one cache: the last position of each prefill call, and every decoded one.

    Args:
        model: the bundle.
        ids: token ids [S].
        segments: that cover positions from 0 on without a gap.
        step: called with the number of tokens done since the last call.
    """
    found: dict[str, list[tuple[int, NDArray[np.float32]]]] = {"prefill": [], "decode": []}
    with model.new_cache(1, model.rounded_length(segments[-1].stop)) as cache:
        spoil(cache.store)
        for segment in segments:
            part = ids[segment.start : segment.stop]
            if segment.graph == "prefill":
                row = model.prefill(cache, [part])[0].copy()
                found["prefill"].append((segment.stop - 1, row))
                step(len(part))
                continue
            for at, token in enumerate(part, start=segment.start):
                found["decode"].append((at, model.decode(cache, [int(token)])[0].copy()))
                step(1)
    return [
        Logits(graph, np.array([at for at, _ in rows]), np.stack([row for _, row in rows]))
        for graph, rows in found.items()
        if rows
    ]


def greedy_continuation(model: Model, prompt: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """The prompt and what the bundle writes behind it, always its best token: [S + tokens]."""
    written = list(prompt)
    with model.new_cache(1, model.rounded_length(len(prompt) + tokens)) as cache:
        logits = model.prefill(cache, [prompt])
        for _ in range(tokens):
            written.append(int(logits[0].argmax()))
            if len(written) < len(prompt) + tokens:
                logits = model.decode(cache, written[-1:])
    return np.array(written, dtype=np.int64)
