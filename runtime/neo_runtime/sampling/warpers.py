"""Logits warpers: rules that shape the distribution to draw from, in the order of `generate`.

temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff (transformers 5). They
use only the scores, so tokens that one rule removed are taken out of the row before the next rule:
the result is the same, and 50 scores cost less than 50 257.

A rule that needs the largest scores in order sorts a few of them, and then more until they cover
the required probability mass. Masses are summed as in the reference (float32 probabilities, float64
sum, compared in float32), so a mass exactly at the limit gives the same result. Among equal scores
at the edge of top_p, the higher ids stay: the sort is stable, which torch does not promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.sampling.scores import FloatArray, IntArray, log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.sampling.processors import LogitsProcessor

__all__ = ["build_warpers", "keep_largest"]

_FIRST_GUESS = 128
_GROWTH = 8
_LARGEST = 3.4e38


class Temperature:
    """Divides the scores."""

    def __init__(self, temperature: float) -> None:
        self._temperature = np.float32(temperature)
        self._largest = _LARGEST * min(temperature, 1.0)
        """Largest score whose quotient is finite."""

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        highest = scores.max()
        with np.errstate(over="ignore"):
            # The quotient would be infinite, and a difference of infinities is NaN.
            if self._largest < abs(float(highest)) < np.inf:
                scores -= highest
            return np.divide(scores, self._temperature, out=scores)


class TopK:
    """Removes scores below the k-th largest (ties with it stay)."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        rank = scores.size - self.top_k
        if rank <= 0:
            return scores
        threshold = np.partition(scores, rank)[rank]
        return _remove(scores, scores < threshold)


class TopP:
    """Keeps the fewest largest scores whose probabilities sum to `top_p`, at least one.

    The reference removes scores from the smallest up, while their sum is at most 1 - top_p.
    """

    def __init__(self, top_p: float) -> None:
        self.limit = np.float32(1 - top_p)

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        highest = scores.max()
        exponentials = np.exp(scores - highest)
        normalizer = exponentials.sum()
        total = (exponentials / normalizer).sum(dtype=np.float64)
        for largest in _largest(scores):
            probabilities = np.exp(largest - highest) / normalizer
            before = np.cumsum(probabilities, dtype=np.float64) - probabilities
            not_removed = (total - before).astype(np.float32) > self.limit
            count = max(1, int(np.count_nonzero(not_removed)))
            if count < largest.size:
                break
        return keep_largest(scores, largest[:count])


class MinP:
    """Removes tokens with less than `min_p` times the largest probability."""

    def __init__(self, min_p: float) -> None:
        self.min_p = np.float32(min_p)

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        probabilities = _softmax(scores)
        return _remove(scores, probabilities < self.min_p * probabilities.max())


class TypicalP:
    """Keeps the scores nearest to the entropy until their probabilities sum to `mass`."""

    def __init__(self, mass: float) -> None:
        self._mass = np.float32(mass)

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        normalized = log_softmax(scores)
        probabilities = np.exp(normalized)
        entropy = _entropy(normalized, probabilities)
        distance = np.abs(-normalized - entropy)
        for order in _smallest(distance):
            sums = np.cumsum(probabilities[order], dtype=np.float64).astype(np.float32)
            last = int(np.count_nonzero(sums < self._mass))
            if last < order.size:
                return _remove(scores, distance > distance[order[last]])
        return scores  # up to rounding, only all of them together reach the mass


class EpsilonCutoff:
    """Removes probabilities below `epsilon`, but not the largest."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = np.float32(epsilon)

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        small = _softmax(scores) < self._epsilon
        return _remove(scores, small & (scores < scores.max()))


class EtaCutoff:
    """Removes probabilities below min(epsilon, √epsilon · exp(-entropy)), but not the largest."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = np.float32(epsilon)

    def __call__(self, ids: IntArray, scores: FloatArray) -> FloatArray:
        normalized = log_softmax(scores)
        probabilities = np.exp(normalized)
        entropy = _entropy(normalized, probabilities)
        eta = min(self._epsilon, np.sqrt(self._epsilon) * np.exp(-entropy))
        return _remove(scores, (probabilities < eta) & (scores < scores.max()))


def build_warpers(options: GenerationOptions) -> list[LogitsProcessor]:
    """The warpers for `options`, in order; none without `do_sample`."""
    warpers: list[LogitsProcessor] = []
    if not options.do_sample:
        return warpers
    if options.temperature != 1.0:
        warpers.append(Temperature(options.temperature))
    if options.top_k:
        warpers.append(TopK(options.top_k))
    if options.top_p < 1.0:
        warpers.append(TopP(options.top_p))
    if options.min_p is not None:
        warpers.append(MinP(options.min_p))
    if options.typical_p < 1.0:
        warpers.append(TypicalP(options.typical_p))
    if options.epsilon_cutoff > 0.0:
        warpers.append(EpsilonCutoff(options.epsilon_cutoff))
    if options.eta_cutoff > 0.0:
        warpers.append(EtaCutoff(options.eta_cutoff))
    return warpers


def _softmax(scores: FloatArray) -> FloatArray:
    exponentials = np.exp(scores - scores.max())
    probabilities: FloatArray = exponentials / exponentials.sum()
    return probabilities


def _entropy(log_probabilities: FloatArray, probabilities: FloatArray) -> np.float32:
    with np.errstate(invalid="ignore"):  # 0 · -inf, which is 0 here
        return np.float32(-np.nansum(log_probabilities * probabilities))


def _sizes(total: int) -> Iterator[int]:
    """How many scores to sort: a few, then more, then all."""
    size = _FIRST_GUESS
    while size < total:
        yield size
        size *= _GROWTH
    yield total


def _largest(values: FloatArray) -> Iterator[FloatArray]:
    """The largest values, descending: a few, then more, then all."""
    for size in _sizes(values.size):
        rank = values.size - size
        yield np.sort(np.partition(values, rank)[rank:] if rank else values)[::-1]


def _smallest(values: FloatArray) -> Iterator[IntArray]:
    """Indices of the smallest values, ascending by (value, index), with all ties of the last."""
    for size in _sizes(values.size):
        edge = np.partition(values, size - 1)[size - 1]
        candidates = np.flatnonzero(values <= edge)
        yield candidates[np.argsort(values[candidates], kind="stable")]


def keep_largest(scores: FloatArray, kept: FloatArray) -> FloatArray:
    """Set all but the `kept` scores (descending) to -inf, in place; of equals the last are kept."""
    edge = kept[-1]
    ties = int(np.count_nonzero(kept == edge))
    removed = scores <= edge
    removed[np.flatnonzero(scores == edge)[-ties:]] = False
    return _remove(scores, removed)


def _remove(scores: FloatArray, removed: NDArray[np.bool_]) -> FloatArray:
    """Set the scores marked in `removed` to -inf, in place."""
    np.copyto(scores, -np.inf, where=removed)
    return scores
