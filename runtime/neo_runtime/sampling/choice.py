"""The token picked at one step, with log probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from neo_runtime.sampling.scores import FloatArray

__all__ = ["Choice", "TokenLogprob", "with_logprobs"]


class TokenLogprob(NamedTuple):
    """A token and its natural-log probability."""

    token: int
    logprob: float


class Choice(NamedTuple):
    """The token picked at one step.

    Log probabilities are those of the model itself: log-softmax of its logits before any
    processor or warper (the convention of OpenAI and vLLM). None unless `logprobs` asks for them.
    """

    token: int
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...] | None
    """The `logprobs` most probable tokens, best first (ascending ids among equals)."""


def with_logprobs(token: int, logits: FloatArray, count: int) -> Choice:
    """A token with its log probability (log-softmax of `logits` [V]) and the `count` best ones."""
    top = logits.max()
    normalizer = float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    best: tuple[TokenLogprob, ...] = ()
    if count > 0:
        count = min(count, logits.size)
        rank = logits.size - count
        edge = np.partition(logits, rank)[rank]
        candidates = np.flatnonzero(logits >= edge)
        order = candidates[np.argsort(-logits[candidates], kind="stable")][:count]
        best = tuple(TokenLogprob(int(i), float(logits[i]) - normalizer) for i in order)
    return Choice(token, float(logits[token]) - normalizer, best)
