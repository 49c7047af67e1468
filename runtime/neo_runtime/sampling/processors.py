"""Logits processors: rules that change logits before a token is picked.

Each rule is a small class called with one row:

    ids     int64 [n]      the prompt and what was generated after it
    scores  float32 [V]    changed in place where that is possible; the result is returned

`rules` builds the processors for given options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from neo_runtime.sampling.scores import FloatArray, IntArray, log_softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LogitsProcessor",
    "raised_tokens",
]

_MINUS_INF = np.float32(-np.inf)
_NONE: IntArray = np.empty(0, np.int64)
_LARGEST = float(np.finfo(np.float32).max)


class LogitsProcessor(Protocol):
    """A rule: (ids int64 [n], scores float32 [V]) → scores float32 [V]."""

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        """Apply the rule; may work in place."""
        ...


def raised_tokens(rule: LogitsProcessor, ids: IntArray) -> IntArray | None:
    """Token ids whose scores the rule may raise after `ids`; None: any token.

    A rule has a method `raises` for this; a rule without it may raise any score.
    """
    find = getattr(rule, "raises", None)
    return None if find is None else find(ids)


class SequenceBias:
    """Adds a bias to the last id of a sequence where `ids` ends with the ids before it.

    Thousands of sequences cost little: a step checks only those whose last id but one was just
    generated, and adds the biases of single ids in one operation.
    """

    def __init__(self, biases: Sequence[tuple[tuple[int, ...], float]]) -> None:
        self._raised = np.array([ids[-1] for ids, bias in biases if bias > 0], np.int64)
        self._always: dict[int, np.float32] = {}
        """Biases of single ids."""
        self._behind: dict[int, list[tuple[IntArray, int, np.float32]]] = {}
        """Last id but one → [(all ids but the last, the last id, its bias)]."""
        for ids, bias in sorted(biases, key=lambda item: len(item[0])):
            if len(ids) == 1:
                before = self._always.get(ids[0], np.float32(0))
                self._always[ids[0]] = before + np.float32(bias)
            else:
                entry = (np.array(ids[:-1], np.int64), ids[-1], np.float32(bias))
                self._behind.setdefault(ids[-2], []).append(entry)
        self._tokens = np.array([*self._always], np.int64)
        self._totals = np.array([*self._always.values()], np.float32)

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return self._raised

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        found: dict[int, np.float32] = {}
        for prefix, token, bias in self._behind.get(int(ids[-1]), ()) if ids.size else ():
            if np.array_equal(ids[ids.size - prefix.size :], prefix):  # False if ids are fewer
                before = found.get(token, self._always.get(token, np.float32(0)))
                found[token] = before + bias
        # Biases are summed first and then added once, as rounding depends on the order.
        sums = {token: scores[token] + bias for token, bias in found.items()}
        scores[self._tokens] += self._totals
        for token, score in sums.items():
            scores[token] = score
        return scores


class RepetitionPenalty:
    """Divides the positive and multiplies the negative scores of all `ids` (arXiv 1909.05858)."""

    def __init__(self, penalty: float) -> None:
        self._penalty = np.float32(penalty)

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return _NONE if self._penalty >= 1 else np.unique(ids)

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        seen = scores[ids]
        # A token that occurs twice is written twice with the same value.
        scores[ids] = np.where(seen < 0, seen * self._penalty, seen / self._penalty)
        return scores


class NoRepeatNGram:
    """Forbids each token that would complete an n-gram already in `ids`."""

    def __init__(self, size: int) -> None:
        self._size = size

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return _NONE

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        if ids.size < self._size:
            return scores
        prefix = ids[ids.size + 1 - self._size :]
        last = ids[self._size - 1 :]
        matches = np.ones(last.size, dtype=np.bool_)
        for place, token in enumerate(prefix):
            matches &= ids[place : place + last.size] == token
        scores[last[matches]] = _MINUS_INF
        return scores


class MinLength:
    """Forbids end-of-sequence until `ids` have `length` tokens."""

    def __init__(self, length: int, eos: Sequence[int]) -> None:
        self._length = length
        self._eos = np.array(eos, np.int64)

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return _NONE

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        if ids.size < self._length:
            scores[_inside(self._eos, scores)] = _MINUS_INF
        return scores


class ForcedEos:
    """Allows only `eos` as the last token before the length limit."""

    def __init__(self, max_length: int, eos: Sequence[int]) -> None:
        self._max_length = max_length
        self._eos = np.array(eos, np.int64)

    def raises(self, ids: IntArray) -> IntArray | None:
        """See `raised_tokens`: any token in the last step, as the forced ones outrank all."""
        return None if ids.size == self._max_length - 1 else _NONE

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        if ids.size == self._max_length - 1:
            scores[:] = _MINUS_INF
            scores[self._eos] = 0
        return scores


class RemoveInvalidValues:
    """Replaces NaN by 0 and infinities by the largest float32 numbers."""

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        np.nan_to_num(scores, copy=False, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
        return scores


class ExponentialDecay:
    """Raises end-of-sequence by |score| · (factor^steps - 1) after `start` new tokens."""

    def __init__(self, start: int, factor: float, eos: Sequence[int], prompt_length: int) -> None:
        self._start = start + prompt_length
        self._factor = factor
        self._eos = np.array(eos, np.int64)

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return self._eos if ids.size > self._start else _NONE

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        steps = ids.size - self._start
        if steps > 0:
            eos = _inside(self._eos, scores)
            eos = eos[np.isfinite(scores[eos])]
            with np.errstate(over="ignore"):
                growth = np.float32(np.float64(self._factor) ** steps - 1)
            scores[eos] += np.abs(scores[eos]) * growth
        return scores


class SuppressTokens:
    """Forbids tokens: always, or only where `ids` have exactly `at` tokens."""

    def __init__(self, tokens: Sequence[int], at: int | None = None) -> None:
        self._tokens = np.array(tokens, np.int64)
        self._at = at

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return _NONE

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        if self._at is None or ids.size == self._at:
            scores[self._tokens] = _MINUS_INF
        return scores


class CountPenalty:
    """logit -= frequency · count + presence · (count > 0), counted over the generated tokens.

    The formula of OpenAI's API reference, "Frequency and presence penalties".
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence = np.float32(presence)
        self._frequency = np.float32(frequency)
        self._prompt_length = prompt_length

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        if self._presence >= 0 and self._frequency >= 0:
            return _NONE
        return np.unique(ids[self._prompt_length :])

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        tokens, counts = np.unique(ids[self._prompt_length :], return_counts=True)
        scores[tokens] -= self._frequency * counts.astype(np.float32) + self._presence
        return scores


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, tokens: Sequence[int], biases: Sequence[float]) -> None:
        self._tokens = np.array(tokens, np.int64)
        self._biases = np.array(biases, np.float32)

    def raises(self, ids: IntArray) -> IntArray:
        """See `raised_tokens`."""
        return self._tokens[self._biases > 0]

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        scores[self._tokens] += self._biases
        return scores


class Renormalize:
    """Log-softmax of the scores."""

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        return log_softmax(scores)


def _inside(tokens: IntArray, scores: FloatArray) -> IntArray:
    """The `tokens` within the vocabulary; an end-of-sequence id may lie outside."""
    inside: IntArray = tokens[tokens < scores.shape[0]]
    return inside
