"""Logits against the reference's, position by position: the worst one counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Comparison", "relative_l2"]

_BLOCK = 128
"""Positions that are in float64 at once: 50 MB each way at a vocabulary of 50257."""


def relative_l2(found: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """‖found − reference‖ / ‖reference‖ of each row, float64 [n]."""
    errors = []
    for start in range(0, len(found), _BLOCK):
        expected = reference[start : start + _BLOCK].astype(np.float64)
        difference = found[start : start + _BLOCK] - expected
        errors.append(np.linalg.norm(difference, axis=-1) / np.linalg.norm(expected, axis=-1))
    return np.concatenate(errors)


class Comparison:
    """Collects positions; says how far the worst is off, and where another token wins."""

    def __init__(self, name: str, reference: NDArray[np.float32]) -> None:
        """Empty.

        Args:
            name: what is compared.
            reference: logits at every position of the text, [n, vocabulary].
        """
        self.name = name
        self._reference = reference
        self._errors: list[float] = []
        self._positions: list[int] = []
        self._disagreements: list[int] = []

    def add(self, found: NDArray[np.float32], position: int) -> None:
        """Compare logits [k, vocabulary] with the reference's from `position` on."""
        for start in range(0, len(found), _BLOCK):
            part = found[start : start + _BLOCK]
            first = position + start
            expected = np.asarray(self._reference[first : first + len(part)])
            if part.shape != expected.shape:
                raise ValueError(f"{self.name}: logits {part.shape}, reference {expected.shape}")
            positions = range(first, first + len(part))
            self._errors += relative_l2(part, expected).tolist()
            self._positions += positions
            self._disagreements += [
                at for at, bad in zip(positions, _disagrees(part, expected), strict=True) if bad
            ]

    def to_json(self) -> dict[str, Any]:
        """Worst relative L2 error (NaN if any is), its position, and the disagreements."""
        worst = int(np.argmax(self._errors))  # numpy takes NaN for the largest
        return {
            "name": self.name,
            "compared": len(self._errors),
            "last_position": max(self._positions),
            "worst": self._errors[worst],
            "worst_position": self._positions[worst],
            "median": float(np.median(self._errors)),
            "disagreements": self._disagreements,
        }


def _disagrees(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rows whose best token differs although the reference's lead exceeds the largest error."""
    best = np.partition(expected, -2, axis=-1)
    lead = best[:, -1] - best[:, -2]
    off = np.abs(found - expected).max(axis=-1)
    differs: NDArray[np.bool_] = found.argmax(axis=-1) != expected.argmax(axis=-1)
    # Written so that a NaN counts as a disagreement.
    result: NDArray[np.bool_] = differs & ~(lead <= off)
    return result
