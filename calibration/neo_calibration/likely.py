"""Collects the head's inputs at many positions, with the likely tokens at each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LIKELY", "POSITIONS", "LikelyCollector"]

POSITIONS = 1 << 15
"""Largest number of positions, evenly spaced: 268 MB of inputs at the 1.3B shape."""
LIKELY = 16
"""Tokens per position. On neo-mini they cover 84 % of Σ p (1 − p). 32 tokens would cover 91 %, but
change GPTQ's divergence by only 1 % and take twice the time."""


class LikelyCollector:
    """Collects the head's inputs and outputs, a few positions at a time."""

    def __init__(self, positions: int, channels: int, vocabulary: int) -> None:
        """Start without positions.

        Args:
            positions: number of positions that will be added in all.
            channels: C.
            vocabulary: V.
        """
        kept = min(LIKELY, vocabulary)
        self._taken = 0
        self._inputs = np.empty((positions, channels), np.float32)
        self._tokens = np.empty((positions, kept), np.int32)
        self._probabilities = np.empty((positions, kept), np.float32)

    def add(self, inputs: Any, logits: Any) -> None:
        """Add torch tensors: inputs [n, C] and logits [n, V], float32."""
        rows = slice(self._taken, self._taken + len(inputs))
        found = logits.softmax(dim=-1).topk(self._tokens.shape[1], dim=-1)
        self._inputs[rows] = inputs.numpy()
        self._tokens[rows] = found.indices.numpy()
        self._probabilities[rows] = found.values.numpy()
        self._taken = rows.stop

    @property
    def arrays(self) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
        """The arrays by their names in the file."""
        return {
            "transformer.final_norm.context": self._inputs,
            "transformer.logits.likely": self._tokens,
            "transformer.logits.probability": self._probabilities,
        }
