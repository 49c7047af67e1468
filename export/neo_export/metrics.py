"""How far two sets of logits, or two hidden states, are apart: plain numpy, in float64.

Rows are positions: `[n, V]` logits over a vocabulary of V, `[n, C]` hidden states. Every function
works through the rows in slices, so that a text over a large vocabulary needs little memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "cross_entropy",
    "kl_divergence",
    "log_softmax",
    "relative_l2",
    "top_1_agreement",
    "top_k_overlap",
]

_SLICE = 1 << 22
"""Logits that are held in float64 at once."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities along the last axis, in nats: x − max − log Σ exp(x − max)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference_logits: NDArray[Any], logits: NDArray[Any]) -> NDArray[np.float64]:
    """KL(reference ‖ found) = Σ p · (log p − log q) of each row, in nats; 0 for equal rows.

    Args:
        reference_logits: [n, V], any floating type.
        logits: [n, V].

    Returns:
        float64 [n]. Never negative: what rounding leaves below zero is zero.
    """
    _check_same_shape(reference_logits, logits)

    def of(rows: slice) -> NDArray[np.float64]:
        p, q = log_softmax(reference_logits[rows]), log_softmax(logits[rows])
        sums: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
        return np.maximum(sums, 0.0)

    return _by_slices(of, reference_logits, np.float64)


def cross_entropy(logits: NDArray[Any], targets: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """−log softmax(logits)[target] of each row, in nats.

    Args:
        logits: [n, V].
        targets: [n], the token that follows at each position.

    Returns:
        float64 [n]; the exponential of its mean is the perplexity.
    """

    def of(rows: slice) -> NDArray[np.float64]:
        wide = logits[rows].astype(np.float64)
        top = wide.max(axis=-1)
        chosen = wide[np.arange(len(wide)), targets[rows]]
        result: NDArray[np.float64] = top - chosen
        result += np.log(np.exp(wide - top[:, None]).sum(axis=-1))
        return result

    return _by_slices(of, logits, np.float64)


def top_1_agreement(reference_logits: NDArray[Any], logits: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row's best token is the same; of equal logits the first token is the best."""
    _check_same_shape(reference_logits, logits)
    agrees: NDArray[np.bool_] = reference_logits.argmax(axis=-1) == logits.argmax(axis=-1)
    return agrees


def top_k_overlap(
    reference_logits: NDArray[Any], logits: NDArray[Any], k: int
) -> NDArray[np.float64]:
    """Share of the reference's best `k` tokens that are among the other's: float64 [n], 0 to 1."""
    _check_same_shape(reference_logits, logits)
    k = min(k, logits.shape[-1])

    def of(rows: slice) -> NDArray[np.float64]:
        one = np.argpartition(-reference_logits[rows], k - 1, axis=-1)[:, :k]
        two = np.argpartition(-logits[rows], k - 1, axis=-1)[:, :k]
        shared = (one[:, :, None] == two[:, None, :]).any(axis=-1)
        return np.asarray(shared.mean(axis=-1), dtype=np.float64)

    return _by_slices(of, logits, np.float64)


def relative_l2(found: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """‖found − reference‖ / ‖reference‖ along the last axis, in float64."""
    difference = found.astype(np.float64) - reference.astype(np.float64)
    norm = np.linalg.norm(reference.astype(np.float64), axis=-1)
    result: NDArray[np.float64] = np.linalg.norm(difference, axis=-1) / np.maximum(norm, 1e-30)
    return result


def _by_slices(
    of: Callable[[slice], NDArray[_Scalar]], logits: NDArray[Any], dtype: type[_Scalar]
) -> NDArray[_Scalar]:
    rows, step = len(logits), max(1, _SLICE // max(1, logits.shape[-1]))
    result = np.empty(rows, dtype)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        result[part] = of(part)
    return result


def _check_same_shape(one: NDArray[Any], two: NDArray[Any]) -> None:
    if one.shape != two.shape:
        raise ValueError(f"logits {list(two.shape)}, expected {list(one.shape)} as the reference")
