"""A short stand-in for long cache buffers, for graphs whose work grows with the buffer.

An int8 cache is widened to float32 where several new tokens attend to it: the prefill graph reads
and writes whole buffers then, however few positions are in use. So a short prompt gets buffers of
just its own length, and what it wrote is copied behind what the real ones hold:

    buffer   k k k . . . . . . . . . . . . .
    staged   k k k n n                          past: its first 3 positions, copied; 2 new ones
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
    """Keys and values of some rows, as one call reads (`past`) and writes (`present`) them."""

    def __init__(
        self, buffers: Sequence[NDArray[Any]], growing: Sequence[bool], past: int, total: int
    ) -> None:
        """Copy the past.

        Args:
            buffers: of the rows of the call, [batch, heads, positions, head_dim] each.
            growing: which of them hold the whole sequence. The others hold a window, of which
                their layers need the room from the first token on: they are used as they are.
            past: positions in use.
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
        """What the call writes."""
        self.past = self.present
        """What the call reads: the same memory, or nothing at all."""
        if not past:
            self.past = [
                staged if staged is buffer else staged[:, :, :0].copy()
                for staged, buffer in zip(self.present, buffers, strict=True)
            ]
            return
        for staged, buffer in self._staged():
            staged[:, :, :past] = buffer[:, :, :past]

    def store(self) -> None:
        """Copy what the call wrote into the buffers."""
        for staged, buffer in self._staged():
            buffer[:, :, self._used] = staged[:, :, self._used]

    def _staged(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        pairs = zip(self.present, self._buffers, strict=True)
        return [(staged, buffer) for staged, buffer in pairs if staged is not buffer]
