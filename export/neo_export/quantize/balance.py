"""Rescales the channels of a tied int4 table to similar size, so that one step fits a block.

    x · Wᵀ  =  (x / s) · (W · s)ᵀ        s_j = ‖column j of W‖^−0.4, geometric mean 1

A block of consecutive inputs shares a step, which its largest column determines; the other columns
use few of the 16 levels. Dividing by the norm itself (exponent 1) gives all columns the same
relative error, although columns with large inputs need a smaller one. Of the exponents 0.3, 0.4,
0.5, 0.6 and ¾, 0.4 gave the least KL divergence with neo-mini's table in blocks of 32 (0.0062 nats;
¾: 0.0068); 0 and 1 are a sixth worse. AWQ (arXiv:2306.00978) chooses such scales by the size of the
activations; here GPTQ accounts for it.
For the layers it gained nothing: the output error of queries, keys and values fell by a fifth, but
the KL divergence of the whole model did not fall, because the inputs are rounded in blocks, too.

Both readers of the table, embedding and head, divide by a vector in the graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from neo_export.gpt_neo.parameters import EMBEDDING, HEAD_INPUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_export.quantize.migration import Migration
    from neo_export.quantize.plan import WeightPlan

__all__ = ["balanced", "channel_scales"]

_EXPONENT = 0.4


def balanced(
    migration: Migration,
    read: Callable[[str], NDArray[np.float32]],
    spec: ModelSpec,
    plan: WeightPlan,
) -> Migration:
    """Add a scale for the table, where it is tied and stored in int4.

    Args:
        migration: the migration of activation outliers.
        read: returns a weight of the checkpoint.
        spec: the architecture.
        plan: the storage of each matrix.
    """
    if not spec.tie_word_embeddings or plan.of(EMBEDDING).kind != "int4":
        return migration
    scale = channel_scales(read(EMBEDDING))
    return replace(migration, scales=dict(migration.scales) | {HEAD_INPUT: scale})


def channel_scales(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The s [in] of a matrix [out, in]."""
    power = np.einsum("ij,ij->j", weight, weight, dtype=np.float64)
    if not power.any():
        return np.ones(power.shape, np.float32)
    # A zero channel gets the smallest power of the others; no power is below 1e-8 of the largest.
    power = np.maximum(power, max(float(power[power > 0].min()), 1e-8 * float(power.max())))
    log = -0.5 * _EXPONENT * np.log(power)
    result: NDArray[np.float32] = np.exp(log - log.mean()).astype(np.float32)
    return result
