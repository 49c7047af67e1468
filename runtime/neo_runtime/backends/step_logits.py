"""The logits of one step of the model, which may still be on the device.

A graph that computes the top tokens itself (`manifest.CANDIDATE_OUTPUTS`) saves copying a row of
vocabulary size from the device. The full logits are copied only when requested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

__all__ = ["CandidateRows", "Candidates", "RowLogits", "StepLogits"]


@dataclass(frozen=True)
class Candidates:
    """The top K tokens of one row, by logit."""

    ids: NDArray[np.int64]
    """[K] token ids, ascending."""
    values: NDArray[np.float32]
    """[K] their logits, all finite."""
    edge: np.float32
    """The smallest of `values`. No other token has a larger logit; ties are possible."""
    exp_sum: float
    """Σ exp(logit − largest logit) over the whole vocabulary, summed in float64."""


@dataclass(frozen=True)
class CandidateRows:
    """A graph's `CANDIDATE_OUTPUTS` for all rows."""

    values: NDArray[np.float32]
    """[batch, K], in any order."""
    ids: NDArray[np.int64]
    """[batch, K]."""
    exp_sums: NDArray[np.float64]
    """[batch]."""

    def row(self, index: int) -> Candidates | None:
        """The candidates of one row; None if a value or the sum is NaN or infinite."""
        values, exp_sum = self.values[index], float(self.exp_sums[index])
        if not (np.isfinite(values).all() and np.isfinite(exp_sum)):
            return None
        order = np.argsort(self.ids[index])
        return Candidates(self.ids[index][order], values[order], values.min(), exp_sum)


class RowLogits:
    """The logits of one row of a step."""

    def __init__(self, step: StepLogits, index: int) -> None:
        self._step, self._index = step, index

    @property
    def candidates(self) -> Candidates | None:
        """The top tokens; None if the graph does not compute them or they are not finite."""
        rows = self._step.candidates
        return None if rows is None else rows.row(self._index)

    @property
    def vocab_size(self) -> int:
        """Number of logits in the row."""
        return self._step.vocab_size

    def full(self) -> NDArray[np.float32]:
        """All logits of the row, float32 [vocab]."""
        row: NDArray[np.float32] = self._step.full()[self._index]
        return row


class StepLogits:
    """The logits of all rows of one step, valid until the next step.

    Args:
        batch: number of rows.
        vocab_size: number of logits in each row.
        fetch: returns the logits, float32 [batch, vocab]; called at most once.
        candidates: the top tokens of each row; None if the graph does not compute them.
    """

    def __init__(
        self,
        batch: int,
        vocab_size: int,
        fetch: Callable[[], NDArray[np.float32]],
        candidates: CandidateRows | None = None,
    ) -> None:
        self.batch, self.vocab_size, self.candidates = batch, vocab_size, candidates
        self._fetch = fetch
        self._logits: NDArray[np.float32] | None = None

    @classmethod
    def at_hand(
        cls, logits: NDArray[np.float32], candidates: CandidateRows | None = None
    ) -> StepLogits:
        """Wrap logits that are already in host memory: float32 [batch, vocab]."""
        batch, vocab_size = logits.shape
        return cls(batch, vocab_size, lambda: logits, candidates)

    @property
    def is_fetched(self) -> bool:
        """Whether the logits have been fetched."""
        return self._logits is not None

    def full(self) -> NDArray[np.float32]:
        """All logits, float32 [batch, vocab]."""
        if self._logits is None:
            self._logits = self._fetch()
        return self._logits

    def take(self, rows: NDArray[np.int64]) -> StepLogits:
        """The logits of the rows with these indices, in this order; indices may repeat."""
        chosen = self.candidates
        if chosen is not None:
            chosen = CandidateRows(chosen.values[rows], chosen.ids[rows], chosen.exp_sums[rows])
        return StepLogits(len(rows), self.vocab_size, lambda: self.full()[rows], chosen)

    def __iter__(self) -> Iterator[RowLogits]:
        return (RowLogits(self, index) for index in range(self.batch))
