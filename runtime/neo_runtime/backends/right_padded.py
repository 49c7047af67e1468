"""How prompts are cut into calls where rows are padded on the right, wherever their buffers lie.

The first prompts of rows go through the graph together, as many as a chunk of tokens has room for;
what comes later goes row by row, because the fused attention takes several new tokens behind a past
for one row only.
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
    """How prompts are cut into calls; where the buffers lie is up to the subclass."""

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
        """Rows from `row` on that are empty, and with padding fit into one call; may be none."""
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
        """The first tokens of the empty rows `row`, `row + 1`, …: one call, padded on the right."""
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
        """Append to one row, at most `chunk` tokens a call."""
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
        """Ids, mask and positions of tokens behind what a row holds."""
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
        """Run the rows from `row` on, as many as `ids` has."""

    @abstractmethod
    def _after_prefill(self) -> StepLogits:
        """Make ready for decoding; the logits that the last calls wrote."""
