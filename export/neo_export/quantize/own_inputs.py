"""Inputs that count for some rows of a matrix and not for others.

A row of the head makes one token's logit, and what its error costs depends on how likely the token
is: KL(p ‖ p + dp) = ½ Var_p(dz) + O(dz³), the diagonal of which is ½ Σ_v p_v (1 − p_v) (dw_v · x)².
So the second moments that row v should be rounded for are E[p_v (1 − p_v) x xᵀ]: of the contexts
in which v is likely. They differ from row to row, and a matrix for each would be out of reach
([vocabulary, C, C]); but few contexts count for a token, so that they are kept as a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.statistics.folder import LikelyTokens

__all__ = ["OWN_SHARE", "OwnInputs", "own_inputs"]

OWN_SHARE = 4.0
"""Weight of a row's own second moments, against 1 for those of all inputs. On neo-mini 2 to 16 come
within 4 % of the same divergence."""
_PRIOR = 4.0
"""A row whose token was in question at so many positions (Σ p (1 − p)) gets half of that weight:
what is known of it is less. 3 to 10 do as well."""


@dataclass(frozen=True)
class OwnInputs:
    """Row v has second moments H + Σ_k weight_k x_k x_kᵀ over its own entries k."""

    inputs: NDArray[np.float32]
    """[in, n]: inputs, one a column."""
    starts: NDArray[np.int64]
    """[out + 1]: entries of row v are those from starts[v] to starts[v + 1]."""
    which: NDArray[np.int64]
    """[entries]: column of `inputs`."""
    weights: NDArray[np.float32]
    """[entries], positive."""

    def of(self, rows: slice) -> OwnInputs:
        """Those of consecutive rows."""
        starts = self.starts[rows.start : rows.stop + 1]
        part = slice(starts[0], starts[-1])
        return OwnInputs(self.inputs, starts - starts[0], self.which[part], self.weights[part])

    def row(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Inputs [in, k] and weights [k] of one row."""
        part = slice(self.starts[row], self.starts[row + 1])
        return self.inputs[:, self.which[part]], self.weights[part]


def own_inputs(
    likely: LikelyTokens, rows: int, scale: NDArray[np.float32] | np.float32
) -> OwnInputs:
    """What counts for the rows of a head.

    Args:
        likely: what is likely where.
        rows: of the head: the vocabulary.
        scale: [in] by which inputs are divided before the head multiplies them.
    """
    owners = likely.tokens.ravel()
    spread = (likely.probabilities * (1 - likely.probabilities)).ravel()
    total = np.bincount(owners, spread, minlength=rows)
    order = np.argsort(owners, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=rows))])
    weights = OWN_SHARE * spread / (total + _PRIOR)[owners]
    return OwnInputs(
        inputs=np.ascontiguousarray((likely.inputs / scale).T),
        starts=starts.astype(np.int64),
        which=order // likely.tokens.shape[1],
        weights=weights[order].astype(np.float32),
    )
