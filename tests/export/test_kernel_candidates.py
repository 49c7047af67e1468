"""The programs that find the largest logits, interpreted by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB, COUNT, BLOCK = 2100, 8, 2048
NAN = np.float32(np.nan)


def found_in(logits: NDArray[np.float32]) -> tuple[Any, Any, Any]:
    """Largest logits, their ids, and the sum of exp(logit - largest), of one row."""
    from neo_export.kernels import programs

    assert logits.shape == (VOCAB,)
    blocks = -(-VOCAB // BLOCK)
    given = torch.from_numpy(logits)
    keys = torch.zeros(blocks * COUNT, dtype=torch.int64)
    sums = torch.zeros(blocks * 2, dtype=torch.float64)
    values, ids = torch.zeros(COUNT), torch.zeros(COUNT, dtype=torch.int64)
    mass = torch.zeros(1, dtype=torch.float64)
    best: Any = programs.best_of_block
    best[(blocks, 1, 1)](given, keys, sums, VOCAB=VOCAB, BLOCK=BLOCK, COUNT_BLOCK=COUNT, PDL=False)
    together: Any = programs.best_of_all
    together[(1, 1, 1)](
        keys,
        sums,
        given,
        values,
        ids,
        mass,
        VOCAB=VOCAB,
        BLOCKS=blocks,
        BLOCKS_BLOCK=2,
        COUNT=COUNT,
        COUNT_BLOCK=COUNT,
        PDL=False,
    )
    return values.numpy(), ids.numpy(), float(mass)


def test_equal_logits_are_in_the_order_of_their_ids() -> None:
    logits = np.random.default_rng(0).integers(-3, 4, VOCAB).astype(np.float32)
    values, ids, mass = found_in(logits)
    np.testing.assert_array_equal(ids, np.argsort(-logits, kind="stable")[:COUNT])
    np.testing.assert_array_equal(values, logits[ids])
    assert mass == pytest.approx(np.exp(logits.astype(np.float64) - 3).sum(), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_found_whatever_its_sign(sign: int) -> None:
    """A processor chooses the sign, and the runtime has to see that a logit is none."""
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)
    logits[[5, 2070]] = np.copysign(NAN, sign)
    values, ids, mass = found_in(logits)
    assert ids[:2].tolist() == [5, 2070]
    assert np.isnan(values[:2]).all()
    assert np.isnan(mass)


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")  # numpy's
@pytest.mark.parametrize("fill", [NAN, -NAN, np.float32(-np.inf), np.float32(np.inf)])
def test_ids_are_of_tokens_whatever_the_logits(fill: np.float32) -> None:
    """Not of what fills the last block, whose logits would be read behind their end."""
    _, ids, _ = found_in(np.full(VOCAB, fill, np.float32))
    assert sorted(ids.tolist()) == list(range(COUNT))
