"""The measures against scipy and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from neo_export.comparison import metrics
from neo_export.comparison.metrics import (
    cross_entropy,
    kl_divergence,
    log_softmax,
    relative_l2,
    top_1_agreement,
    top_k_overlap,
)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two sets of logits [64, 1000] that differ a little, of a wide range."""
    generator = np.random.default_rng(0)
    one = generator.normal(0, 8, (64, 1000)).astype(np.float32)
    return one, one + generator.normal(0, 0.5, one.shape).astype(np.float32)


def test_log_softmax(pair: tuple[np.ndarray, np.ndarray]) -> None:
    from scipy.special import log_softmax as expected

    found = log_softmax(pair[0])
    assert found.dtype == np.float64
    assert found == pytest.approx(expected(pair[0].astype(np.float64), axis=-1), abs=1e-12)


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_kl_divergence(
    pair: tuple[np.ndarray, np.ndarray], rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.special import rel_entr, softmax

    monkeypatch.setattr(metrics, "_SLICE", rows_at_once * 1000)
    one, two = pair
    p, q = (softmax(x.astype(np.float64), axis=-1) for x in (one, two))
    assert kl_divergence(one, two) == pytest.approx(rel_entr(p, q).sum(axis=-1), rel=1e-9)
    backwards = kl_divergence(two, one)
    assert np.abs(kl_divergence(one, two) / backwards - 1).min() > 1e-6


def test_kl_of_equals_is_exactly_zero(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert (kl_divergence(pair[0], pair[0].copy()) == 0).all()
    one = pair[0] + np.float32(3)  # rounding alone
    assert (kl_divergence(pair[0], one) >= 0).all()
    assert kl_divergence(pair[0], one).max() < 1e-10


def test_kl_tells_nan_apart_from_agreement(pair: tuple[np.ndarray, np.ndarray]) -> None:
    broken = pair[1].copy()
    broken[3, 7] = np.nan
    assert np.flatnonzero(np.isnan(kl_divergence(pair[0], broken))).tolist() == [3]


def test_cross_entropy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    import torch

    targets = np.random.default_rng(1).integers(0, 1000, 64)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(pair[0]).double(), torch.tensor(targets), reduction="none"
    )
    assert cross_entropy(pair[0], targets) == pytest.approx(expected.numpy(), rel=1e-12)


def test_best_tokens() -> None:
    one = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]], dtype=np.float32)
    two = np.array([[4.0, 5.0, 3.0, 2.0, 1.0], [0.0, 9.0, 3.0, 4.0, 9.5]], dtype=np.float32)
    assert top_1_agreement(one, two).tolist() == [False, True]
    assert top_k_overlap(one, two, 2).tolist() == [1.0, 0.5]
    assert top_k_overlap(one, two, 9).tolist() == [1.0, 1.0]


def test_a_near_tie_has_two_best_tokens() -> None:
    reference = np.array([[-8.0, 4.0, 3.999], [-2.0, 1.0, 0.999]], dtype=np.float32)
    found = np.array([[-8.0, 3.9, 4.0], [-2.0, 1.0, 1.1]], dtype=np.float32)
    assert top_1_agreement(reference, found).tolist() == [False, False]
    assert top_1_agreement(reference, found, 2e-4).tolist() == [True, False]
    assert top_1_agreement(reference, reference).all()
    found[0, 0] = np.nan
    assert not top_1_agreement(reference, found, 2e-4).any()


def test_relative_l2() -> None:
    one, two = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.5], [0.0, 0.0]])
    assert relative_l2(two, one) == pytest.approx([0.1, 0.0])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\], expected \[2, 4\]"):
        kl_divergence(np.zeros((2, 4)), np.zeros((2, 3)))
