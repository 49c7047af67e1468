"""Split prompts into prefill calls for caches whose rows are padded on the right.

Prompts of empty rows are prefilled together, as many as fit into a chunk with their padding. A row
with a past is prefilled alone, because the fused attention accepts several new tokens after a past
only for a batch of one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.backends.base import CacheStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.step_logits import StepLogits

__all__ = ["RightPaddedStore"]


class RightPaddedStore(CacheStore):
    """Splits prompts into prefill calls; subclasses own the buffers and run the graph."""

    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """See `CacheStore.prefill`."""
        row = 0
        while row < len(prompts):
            together = self._together(row, prompts, chunk)
            if together:
                self._prefill_first(row, prompts[row : row + together])
            else:
                self._prefill_row(row, prompts[row], chunk)
            row += max(together, 1)
        return self._after_prefill()

    def _together(self, row: int, prompts: Sequence[NDArray[np.int64]], chunk: int) -> int:
        """Number of empty rows, from `row` on, whose padded prompts fit into one call; may be 0."""
        count, longest = 0, 0
        while row + count < len(prompts) and self._is_first(row + count, prompts):
            longest = max(longest, len(prompts[row + count]))
            if longest * (count + 1) > chunk:
                break
            count += 1
        return count

    def _is_first(self, row: int, prompts: Sequence[NDArray[np.int64]]) -> bool:
        return not self.lengths[row] and len(prompts[row]) > 0

    def _prefill_first(self, row: int, prompts: Sequence[NDArray[np.int64]]) -> None:
        """Prefill the empty rows `row`, `row + 1`, … in one call, padded on the right."""
        counts = np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), counts.max()), dtype=np.int64)
        for padded, prompt in zip(ids, prompts, strict=True):
            padded[: len(prompt)] = prompt
        columns = np.arange(ids.shape[1], dtype=np.int64)
        mask = (columns < counts[:, None]).astype(np.int64)
        positions = np.ascontiguousarray(np.broadcast_to(columns, ids.shape))
        self._run_prefill(row, ids, mask, positions)
        self.lengths[row : row + len(prompts)] = counts

    def _prefill_row(self, row: int, prompt: NDArray[np.int64], chunk: int) -> None:
        """Append tokens to one row, at most `chunk` per call."""
        for start in range(0, len(prompt), chunk):
            ids = prompt[start : start + chunk]
            if not self.lengths[row]:
                self._prefill_first(row, [ids])
                continue
            self._run_prefill(row, *self._behind(row, ids))
            self.lengths[row] += len(ids)

    def _behind(
        self, row: int, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Inputs for appending tokens `ids`, int64 [n], to a row that holds `past` positions.

        Returns:
            `input_ids` [1, n], `attention_mask` [1, past + n] and `position_ids` [1, n], int64.
        """
        past = int(self.lengths[row])
        end = past + len(ids)
        mask = np.ones((1, end), dtype=np.int64)
        return np.ascontiguousarray(ids)[None], mask, np.arange(past, end, dtype=np.int64)[None]

    @abstractmethod
    def _run_prefill(
        self,
        row: int,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        """Run the prefill graph on `len(ids)` rows from `row` on.

        Args:
            row: first row.
            ids: int64 [rows, n].
            mask: int64 [rows, past + n].
            positions: int64 [rows, n].
        """

    @abstractmethod
    def _after_prefill(self) -> StepLogits:
        """Prepare for decode, and return the logits that the prefill calls wrote."""
