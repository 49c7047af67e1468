"""Picks a token from only a row's best ones, where that provably gives the same token.

A graph gives the K largest logits of a row, Σ exp over the whole row, and the *edge*: the smallest
of the K; no other logit is larger. `CandidatePicker.scores` returns exactly the scores that the
rules leave of the whole row, or None if that takes the whole row. Why the result is the same:

- **Ties.** An engine may choose any of several equal logits for the last places. A candidate above
  the edge is *certain*: all tokens with such a logit are candidates. Only certain candidates decide
  anything.
- **Processors** change the scores of specific tokens. One that only lowers scores leaves every
  other token at or below the edge. One that may raise scores (`raises`) is applied if all tokens
  that it may raise are candidates; otherwise the result is None.
- **temperature** divides every score, and the edge as well. Rounding keeps the order: a score above
  the edge may become equal to it, and is then no longer certain.
- **greedy** takes the largest score, the lowest id among equals: decided if it is certain.
- **top_k** keeps all scores of at least the k-th largest. With k certain scores, the k-th largest
  is known, and all scores kept are certain. From there on the row *is* the few scores left, in
  ascending order of ids, and all later rules and the draw compute on the same array as with the
  whole row.
- **top_p** without top_k compares partial sums of probabilities with a limit. Only their
  normalizer depends on the rest of the row. It is known within bounds (`_normalizer`); the number
  of tokens kept is decided if both bounds, widened by float32 rounding, give the same number.
- **min_p** compares exponentials with that of the largest score, so the normalizer cancels except
  for rounding: decided if no candidate lies that near to the limit, and the edge lies below it.
- Rules that need an entropy, draws without top_k, top_p or min_p, log probabilities and beam
  search need the whole row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.sampling.processors import LogitsProcessor, raised_tokens
from neo_runtime.sampling.warpers import MinP, Temperature, TopK, TopP, keep_largest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.backends.step_logits import Candidates
    from neo_runtime.sampling.scores import FloatArray, IntArray

__all__ = ["CandidatePicker"]

_SUM_ERROR = 1e-5
"""Bound of the relative difference between Σ exp as a device gives it and as numpy does, with room
to spare. Device: float64 sum of float32 exponentials, 2^(x · log₂e) with the product rounded, which
is off by |x| · 7e-8: 1.4e-6 at x = −20, and terms below that hardly count. numpy: 3 ulp, float32
pairwise sum (30 roundings of 2⁻²⁴ = 2e-6)."""
_ROUNDING = 1e-5
"""Bound of the change that float32 rounding makes in a sum of probabilities near 1; see above."""


class CandidatePicker:
    """The rules of one sequence, applied to candidates.

    Args:
        processors: the processors, in order.
        warpers: the warpers, in order; none for greedy decoding.
        do_sample: whether the token is drawn.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        warpers: Sequence[LogitsProcessor],
        *,
        do_sample: bool,
    ) -> None:
        self._processors, self._warpers, self._do_sample = processors, warpers, do_sample
        self._row: FloatArray | None = None

    def scores(
        self, history: IntArray, found: Candidates, vocab_size: int
    ) -> tuple[IntArray, FloatArray] | None:
        """The scores that the rules leave of the row; None if the whole row is needed.

        Args:
            history: prompt and continuation, int64 [n].
            found: the candidates.
            vocab_size: tokens of the whole row.

        Returns:
            Token ids, ascending, and their scores, float32: those to draw from, or the best one
            with greedy decoding.
        """
        scores = self._processed(history, found, vocab_size)
        if scores is None:
            return None
        if not self._do_sample:
            best = int(scores.argmax())
            decided = scores[best] > found.edge and np.isfinite(scores[best])
            return (found.ids[best : best + 1], scores[best : best + 1]) if decided else None
        return self._warped(history, found, scores, vocab_size)

    def _processed(
        self, history: IntArray, found: Candidates, vocab_size: int
    ) -> FloatArray | None:
        """The candidates' scores after the processors; None if another token may be raised."""
        if not self._processors:
            return found.values.copy()
        for rule in self._processors:
            raised = raised_tokens(rule, history)
            if raised is None or not np.isin(raised, found.ids).all():
                return None
        if self._row is None:
            self._row = np.full(vocab_size, -np.inf, dtype=np.float32)
        row = self._row
        row[found.ids] = found.values
        for rule in self._processors:
            row = rule(history, row)  # no other token is raised, so all others stay at -inf
        scores: FloatArray = row[found.ids]
        row[found.ids] = -np.inf
        return scores

    def _warped(
        self, history: IntArray, found: Candidates, scores: FloatArray, vocab_size: int
    ) -> tuple[IntArray, FloatArray] | None:
        ids, edge, is_whole = found.ids, found.edge, False
        # Σ exp is that of the unchanged logits.
        exp_sum = None if self._processors else found.exp_sum
        for warper in self._warpers:
            if is_whole:
                scores = warper(history, scores)
            elif isinstance(warper, Temperature):
                scores = warper(history, scores)
                edge = warper(history, np.array([edge], dtype=np.float32))[0]
                exp_sum = None
                if not np.isfinite(scores.max()):
                    return None
                continue
            else:
                others = vocab_size - scores.size
                kept = _kept(warper, history, scores, edge, others, exp_sum)
                if kept is None:
                    return None
                scores, is_whole = kept, True
            left = np.flatnonzero(scores > -np.inf)
            if left.size < scores.size:
                ids, scores = ids[left], scores[left]
        return (ids, scores) if is_whole else None


def _kept(
    warper: LogitsProcessor,
    history: IntArray,
    scores: FloatArray,
    edge: np.float32,
    others: int,
    exp_sum: float | None,
) -> FloatArray | None:
    """The scores, with -inf where the warper removes one from the whole row; None if undecided."""
    certain = np.where(scores > edge, scores, np.float32(-np.inf))
    count = int(np.count_nonzero(certain > -np.inf))
    if not count:
        return None
    if isinstance(warper, TopK):
        return warper(history, certain) if count >= warper.top_k else None
    if isinstance(warper, TopP):
        low, high = _normalizer(scores, edge, others, exp_sum)
        keep = _top_p_count(np.sort(certain)[::-1][:count], warper.limit, low, high)
        if keep is None:
            return None
        return keep_largest(certain, np.sort(certain)[::-1][:keep])
    if isinstance(warper, MinP):
        return _min_p(certain, warper.min_p, edge)
    return None


def _normalizer(
    scores: FloatArray, edge: np.float32, others: int, exp_sum: float | None
) -> tuple[float, float]:
    """Bounds of Σ exp(score − largest) over the whole row.

    The other tokens add at least 0 and at most `others` times the edge's exponential.
    """
    top = scores.max()
    known = float(np.exp(scores - top).sum(dtype=np.float64))
    low, high = known, known + others * float(np.exp(np.float64(edge) - np.float64(top)))
    if exp_sum is not None:
        low, high = max(low, exp_sum), min(high, exp_sum)
    return low * (1 - _SUM_ERROR), high * (1 + _SUM_ERROR)


def _top_p_count(ordered: FloatArray, limit: np.float32, low: float, high: float) -> int | None:
    """How many tokens of the whole row `TopP` keeps; None if the bounds do not decide it.

    Args:
        ordered: the certain scores, descending.
        limit: 1 - top_p; a score is kept while 1 − (sum of the probabilities before it) is above.
        low: smallest possible normalizer.
        high: largest possible normalizer.
    """
    exponentials = np.exp(ordered - ordered[0]).astype(np.float64)
    before = np.cumsum(exponentials) - exponentials
    is_kept = 1 - before / low > limit + _ROUNDING
    is_removed = 1 - before / high < limit - _ROUNDING
    is_kept[0], is_removed[0] = True, False  # at least one is kept
    count = int(np.count_nonzero(is_kept))
    # The kept ones come first. The result is decided if the next one is certainly removed.
    return count if count < ordered.size and is_removed[count] else None


def _min_p(certain: FloatArray, min_p: np.float32, edge: np.float32) -> FloatArray | None:
    top = certain.max()
    exponentials = np.exp(certain - top).astype(np.float64)
    if float(np.exp(edge - top)) > min_p * (1 - _ROUNDING):
        return None
    if (np.abs(exponentials - min_p) <= min_p * _ROUNDING).any():
        return None
    return np.where(exponentials < min_p, np.float32(-np.inf), certain)
