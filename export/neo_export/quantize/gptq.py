"""int4 and int8 quantization that minimizes the error of a product's outputs, not of its weights.

With H = E[x xᵀ] over the inputs x, the outputs' squared error is E‖dW x‖² = tr(dW H dWᵀ). Rows of W
are independent of each other. For each row, in this order:

1. GPTQ (Frantar et al., arXiv:2210.17323), in the form that QuIP gave it (Chee et al.,
   arXiv:2307.13304, theorem 6): with H = (U + I) D (U + I)ᵀ, U strictly upper triangular, column j
   becomes round(w_j + Σ_{i<j} (w_i − q_i) U_ij), and the error is Σ_j D_j (rounding error of j)².
   So each column compensates for the errors of those before it. This takes one triangular factor;
   H is never inverted.
2. A block's scale is chosen while its columns are rounded: the whole block is rounded with each
   candidate, and the candidate of least Σ D_j e_j² is kept.
3. Refinement steps, each of which lowers tr(dW H dWᵀ) (`neo_export.quantize.refinement`): all
   scales of a row by least squares with the integers fixed, then each integer in turn with all
   others fixed.

The computation works on Wᵀ, so that a column of W is contiguous, in slabs of rows of W.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.machine.cores import usable_processors

from neo_export.quantize.refinement import descend, fit_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.quantize.levels import Levels
    from neo_export.quantize.own_inputs import OwnInputs

__all__ = ["DAMPING", "damped", "gptq"]

DAMPING = 0.03
"""Share of the mean of H's diagonal that is added to the diagonal. The paper uses 0.01; with the
refinement after GPTQ, 0.03 to 0.1 gave the least KL divergence on held-out text (neo-mini)."""
_ROUNDS = 3
_SLAB = 1 << 21  # numbers in a slab of W: 8 MB of float32; about six arrays of that size are held
_PANEL = 128


def damped(moment: NDArray[np.floating[Any]], damping: float = DAMPING) -> NDArray[np.float64]:
    """H with a share of its mean diagonal added: positive definite even with dead channels."""
    wide = moment.astype(np.float64)
    mean = float(np.trace(wide)) / len(wide)
    wide[np.diag_indices(len(wide))] += damping * mean if mean > 0 else 1.0
    return wide


def gptq(
    weight: NDArray[np.float32],
    moment: NDArray[np.float64],
    size: int,
    levels: Levels,
    own: OwnInputs | None = None,
    rounds: int = _ROUNDS,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize [out, in] for a small error of the outputs.

    Args:
        weight: [out, in].
        moment: [in, in] second moments of the inputs, `damped`; if rounding errors have made them
            indefinite, more is added to the diagonal.
        size: consecutive inputs that share a scale; divides `in`.
        levels: the integers, and candidates for scales.
        own: inputs that count for single rows, in addition to H. Only the refinement uses them,
            GPTQ itself uses H alone.
        rounds: refinement rounds after GPTQ.

    Returns:
        Integers [out, in] and scales [out, in / size].
    """
    moment, feedback, diagonal = _definite(moment)
    narrow = moment.astype(np.float32)

    def quantize(rows: slice) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        turned = np.ascontiguousarray(weight[rows].T)
        theirs = None if own is None else own.of(rows)
        integers, scales = _first(turned, feedback, diagonal, size, levels)
        for _ in range(rounds):
            scales = fit_scales(turned, integers, scales, narrow, theirs)
            descend(turned, integers, scales, narrow, theirs, levels)
        return integers.T.astype(np.int8), np.ascontiguousarray(scales.T)

    # Slabs do not depend on the number of cores: another order of summation may change an integer.
    rows = max(1, _SLAB // weight.shape[1])
    slabs = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    with ThreadPoolExecutor(usable_processors()) as pool:
        parts = list(pool.map(quantize, slabs))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _definite(
    moment: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """H, with enough added to its diagonal to be positive definite, and its factors U and D.

    Moments that were shifted by a large mean are differences of large float32 numbers; their
    error may exceed the damping.
    """
    more = DAMPING * float(np.trace(moment)) / len(moment)
    assert np.isfinite(more), "statistics are checked when they are opened"
    lifted = moment
    while True:
        try:
            return lifted, *_factor(lifted)
        except np.linalg.LinAlgError:
            lifted = moment + np.diag(np.full(len(moment), more))
            more *= 2


def _factor(moment: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(U [C, C], D [C]) of H = (U + I) D (U + I)ᵀ: Cholesky, starting from the last column."""
    upper = np.linalg.cholesky(moment[::-1, ::-1])[::-1, ::-1]
    root = np.diagonal(upper).copy()
    unit = (upper / root[None, :]).astype(np.float32)
    unit[np.diag_indices(len(unit))] = 0
    return unit, (root * root).astype(np.float32)


def _first(
    weight: NDArray[np.float32],
    feedback: NDArray[np.float32],
    diagonal: NDArray[np.float32],
    size: int,
    levels: Levels,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """GPTQ: integers [in, n] and scales [in / size, n] of Wᵀ [in, n].

    Blocks of more than two panels take the scales of plain rounding, because a search would round
    the whole block once for each candidate.
    """
    inputs, count = weight.shape
    integers = np.empty_like(weight)
    scales = np.empty((inputs // size, count), np.float32)
    off = np.zeros_like(weight)  # W − Q of the columns that are done
    step, factors = (size, levels.factors) if size <= 2 * _PANEL else (_PANEL, (1.0,))
    for start in range(0, inputs, step):
        part, block = slice(start, min(inputs, start + step)), start // size
        owed = feedback[:start, part].T @ off[:start]
        target = weight[part] + owed
        if step == size:
            # The columns' targets if the block's earlier columns were rounded without error.
            within = feedback[part, part] + np.eye(size, dtype=np.float32)
            base = levels.base(weight[part] + np.linalg.solve(within.T, owed))
        else:
            base = levels.base(weight[block * size : (block + 1) * size])
        least = np.full(count, np.inf, np.float32)
        for factor in factors:
            scale = base * np.float32(factor)
            chosen, error = _round_block(
                target, weight[part], feedback[part, part], diagonal[part], scale, levels
            )
            better = error < least
            least[better], scales[block, better] = error[better], scale[better]
            integers[part, better] = chosen[:, better]
        off[part] = weight[part] - integers[part] * scales[block]
    return integers, scales


def _round_block(
    target: NDArray[np.float32],
    weight: NDArray[np.float32],
    feedback: NDArray[np.float32],
    diagonal: NDArray[np.float32],
    scale: NDArray[np.float32],
    levels: Levels,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Round columns in turn, each compensating for those before it: integers, and Σ D e².

    Args:
        target: [size, n] the columns, corrected for the errors before this block.
        weight: [size, n] the columns themselves.
        feedback: [size, size] part of U.
        diagonal: [size] part of D.
        scale: [n].
        levels: the integers.
    """
    moving, integers = target.copy(), np.empty_like(target)
    error = np.zeros(target.shape[1], np.float32)
    for j in range(len(target)):
        integers[j] = levels.round(moving[j] / scale)
        found = integers[j] * scale
        error += diagonal[j] * (moving[j] - found) ** 2
        moving[j + 1 :] += feedback[j, j + 1 :, None] * (weight[j] - found)
    return integers, error
