"""int4 and int8 by the error of a product's outputs, not of its weights.

A product's outputs for inputs x are off by E‖dW x‖² = tr(dW H dWᵀ), with H = E[x xᵀ]. Rows of W are
independent of each other. For each, in this order:

1. GPTQ (Frantar et al., arXiv:2210.17323), in the form that QuIP gave it (Chee et al.,
   arXiv:2307.13304, theorem 6): with H = (U + I) D (U + I)ᵀ, U strictly upper triangular, column j
   becomes round(w_j + Σ_{i<j} (w_i − q_i) U_ij), and the error is Σ_j D_j (rounding error of j)².
   So a column makes up for those before it. One triangular factor; H is never inverted.
2. A block's scale is chosen while its columns are rounded: every candidate rounds the whole block,
   and the one of least Σ D_j e_j² is kept.
3. Refinement, each step of which lowers tr(dW H dWᵀ) (`neo_export.quantize.refinement`): all
   scales of a row by least squares with the integers fixed, then each integer in turn with all
   others fixed.

Work is done on Wᵀ, so that a column of W is contiguous, and a slab of rows at a time.
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
"""Share of the mean of H's diagonal that is added to it. The paper has 0.01; with the refinement
that comes after it, 0.03 to 0.1 gave the least KL on text that H had not seen (neo-mini)."""
_ROUNDS = 3
_SLAB = 1 << 21  # numbers of a slab of W: 8 MB of float32; about six arrays of the size are held
_PANEL = 128


def damped(moment: NDArray[np.floating[Any]], damping: float = DAMPING) -> NDArray[np.float64]:
    """H with a share of its mean diagonal added: positive definite, also with dead channels."""
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
    """Quantize [out, in] so that outputs move little.

    Args:
        weight: [out, in].
        moment: [in, in] second moments of the inputs, `damped`; more is added where rounding has
            left them indefinite.
        size: consecutive inputs that share a scale; divides `in`.
        levels: the integers, and candidates for scales.
        own: inputs that count for single rows, on top of H. The refinement knows them, GPTQ itself
            sees H alone.
        rounds: refinements after GPTQ itself.

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

    # Not by the number of cores: a sum in another order may turn an integer.
    rows = max(1, _SLAB // weight.shape[1])
    slabs = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    with ThreadPoolExecutor(usable_processors()) as pool:
        parts = list(pool.map(quantize, slabs))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _definite(
    moment: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """H with as much on its diagonal as it needs, and its factors.

    Moments about a large mean are differences of large float32 numbers, off by more than the
    damping may be.
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
    """(U [C, C], D [C]) of H = (U + I) D (U + I)ᵀ: a Cholesky factor from the last column on."""
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

    Scales of blocks that are longer than a panel are those of plain rounding, as a block has to
    be rounded once for each candidate.
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
            # Where the columns will be headed, if those between round without error.
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
    """Some columns in turn, each making up for those before: integers, and Σ D e².

    Args:
        target: [size, n] what the columns should be, given those before this block.
        weight: [size, n] what they are.
        feedback: [size, size] of U.
        diagonal: [size] of D.
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
