"""Compares logits: one figure per position, and their summaries."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from neo_export.comparison import metrics
from neo_export.comparison.places import region_masks
from neo_export.tolerances import NEAR_TIE

from neo_tools.diff.results import GraphSummary, Perplexity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["PositionMetrics", "compare_rows", "joined", "perplexity", "summaries"]


@dataclass(frozen=True)
class PositionMetrics:
    """Metrics of the compared positions, [n] each."""

    context: NDArray[np.int64]
    position: NDArray[np.int64]
    token: NDArray[np.int64]
    kl: NDArray[np.float64]
    top_1: NDArray[np.bool_]
    top_5: NDArray[np.float64]
    logit_error: NDArray[np.float64]
    """Relative L2 over the vocabulary."""
    nll_reference: NDArray[np.float64]
    """−log probability of the next token, nats; NaN at the last position of a context."""
    nll_bundle: NDArray[np.float64]
    best_reference: NDArray[np.int64]
    best_bundle: NDArray[np.int64]
    errors: NDArray[np.float32]
    """[n, 8]: max, mean, median and p99 of absolute, then of relative errors over the
    vocabulary."""


def compare_rows(
    context: int,
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    found: NDArray[np.float32],
    reference: NDArray[np.float32],
) -> PositionMetrics:
    """Compare logits [n, V] at `positions` [n] of the text `ids` [S]."""
    follows = positions + 1 < len(ids)
    targets = ids[np.minimum(positions + 1, len(ids) - 1)]
    statistics = metrics.error_statistics(found, reference)
    return PositionMetrics(
        context=np.full(len(positions), context, dtype=np.int64),
        position=positions,
        token=ids[positions],
        kl=metrics.kl_divergence(reference, found),
        top_1=metrics.top_1_agreement(reference, found, NEAR_TIE),
        top_5=metrics.top_k_overlap(reference, found, 5),
        logit_error=metrics.logit_error(found, reference),
        nll_reference=np.where(follows, metrics.cross_entropy(reference, targets), np.nan),
        nll_bundle=np.where(follows, metrics.cross_entropy(found, targets), np.nan),
        best_reference=reference.argmax(axis=-1),
        best_bundle=found.argmax(axis=-1),
        errors=np.stack(list(statistics.values()), axis=1),
    )


def joined(parts: Sequence[PositionMetrics]) -> PositionMetrics:
    """All positions of all parts, in their order."""
    return PositionMetrics(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(PositionMetrics)
        }
    )


def summaries(graph: str, found: PositionMetrics, window: int) -> list[GraphSummary]:
    """Summaries of all positions, and of each region that has positions."""
    masks = {"all": np.ones(len(found.position), dtype=np.bool_)}
    masks |= region_masks(found.position, window)
    return [_summary(graph, name, found, mask) for name, mask in masks.items() if mask.any()]


def _summary(
    graph: str, region: str, found: PositionMetrics, mask: NDArray[np.bool_]
) -> GraphSummary:
    kl, errors = found.kl[mask], found.errors[mask]
    kinds = ("max", "mean", "median", "p99")
    whole = [float(errors[:, i].max() if i % 4 == 0 else np.median(errors[:, i])) for i in range(8)]
    return GraphSummary(
        graph=graph,
        region=region,
        positions=int(mask.sum()),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top_1=float(found.top_1[mask].mean()),
        top_5=float(found.top_5[mask].mean()),
        logit_error_median=float(np.median(found.logit_error[mask])),
        logit_error_max=float(found.logit_error[mask].max()),
        absolute=dict(zip(kinds, whole[:4], strict=True)),
        relative=dict(zip(kinds, whole[4:], strict=True)),
    )


def perplexity(found: PositionMetrics) -> Perplexity:
    """Perplexity, exp of the mean −log probability, over every token but the first of each context.

    The increase is exp(mean d) − 1 with d = nll_bundle − nll_reference for each token (paired). Its
    interval follows from that of the mean of d: see `bootstrap_interval`.
    """
    known = ~np.isnan(found.nll_reference)
    reference, bundle = found.nll_reference[known], found.nll_bundle[known]
    difference = bundle - reference
    interval = metrics.bootstrap_interval(difference)
    return Perplexity(
        tokens=len(difference),
        reference=_exp(reference.mean()),
        bundle=_exp(bundle.mean()),
        increase=_exp(difference.mean()) - 1,
        low=None if interval is None else _exp(interval[0]) - 1,
        high=None if interval is None else _exp(interval[1]) - 1,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
