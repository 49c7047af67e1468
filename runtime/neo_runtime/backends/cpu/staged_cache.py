"""Short temporary buffers in place of long cache buffers, for prefill over an int8 cache.

With several new tokens the graph converts an int8 cache to float32, and so reads and writes whole
buffers, however few positions are in use. A short prompt therefore runs over buffers of its own
length, and the new positions are copied into the cache:

    buffer   k k k . . . . . . . . . . . . .
    staged   k k k n n                          3 past positions, copied, and 2 new ones
    buffer   k k k n n . . . . . . . . . . .
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["StagedCache"]


class StagedCache:
    """The cache tensors of some rows for one call, which reads `past` and writes `present`."""

    def __init__(
        self, buffers: Sequence[NDArray[Any]], growing: Sequence[bool], past: int, total: int
    ) -> None:
        """Allocate the temporary buffers, and copy the past.

        Args:
            buffers: the cache tensors, [batch, heads, positions, head_dim] each.
            growing: for each tensor, whether it holds the whole sequence. The others hold a window,
                whose full size their layers need from the first token on; they are used directly.
            past: positions in use before the call.
            total: positions in use after the call.
        """
        self._buffers = buffers
        self._used = slice(past, total)
        self.present = [
            np.empty((*buffer.shape[:2], total, buffer.shape[3]), dtype=buffer.dtype)
            if grows
            else buffer
            for buffer, grows in zip(buffers, growing, strict=True)
        ]
        """Outputs of the call, in the order of `buffers`."""
        self.past = self.present
        """Inputs of the call: the same memory; empty tensors if there is no past."""
        if not past:
            self.past = [
                staged if staged is buffer else staged[:, :, :0].copy()
                for staged, buffer in zip(self.present, buffers, strict=True)
            ]
            return
        for staged, buffer in self._staged():
            staged[:, :, :past] = buffer[:, :, :past]

    def store(self) -> None:
        """Copy the new positions into the cache."""
        for staged, buffer in self._staged():
            buffer[:, :, self._used] = staged[:, :, self._used]

    def _staged(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        pairs = zip(self.present, self._buffers, strict=True)
        return [(staged, buffer) for staged, buffer in pairs if staged is not buffer]
