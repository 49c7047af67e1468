"""Rows of the head rounded for the contexts in which their token is likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from neo_export.quantize.gptq import damped, gptq
from neo_export.quantize.gptq_quantizer import GptqQuantizer
from neo_export.quantize.levels import Levels
from neo_export.quantize.own_inputs import OWN_SHARE, OwnInputs, own_inputs
from neo_export.statistics.folder import LikelyTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVELS = Levels(-8, 7, (1.0, 1.1, 0.9, 0.8))
ROWS, INPUTS, POSITIONS, LIKELY = 20, 64, 500, 3
NO_SCALE = np.float32(1)


@pytest.fixture(scope="module")
def weight() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(ROWS, INPUTS)).astype(np.float32)


@pytest.fixture(scope="module")
def likely(weight: NDArray[np.float32]) -> LikelyTokens:
    """What `weight`, as a head, expects after some inputs; the last token is never likely."""
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(POSITIONS, INPUTS)).astype(np.float32)
    inputs *= generator.lognormal(0, 0.5, INPUTS).astype(np.float32)
    logits = 0.3 * inputs @ weight.T
    logits[:, -1] = -100
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    tokens = np.argsort(-probabilities, axis=1)[:, :LIKELY].astype(np.int32)
    return LikelyTokens(inputs, tokens, np.take_along_axis(probabilities, tokens, axis=1))


def moments(likely: LikelyTokens) -> NDArray[np.float64]:
    return damped(likely.inputs.T @ likely.inputs / POSITIONS)


def own_moment(own: OwnInputs, row: int) -> NDArray[np.float64]:
    inputs, weights = own.row(row)
    wide = inputs.astype(np.float64)
    result: NDArray[np.float64] = (wide * weights) @ wide.T
    return result


def errors(
    weight: NDArray[np.float32], likely: LikelyTokens, own: OwnInputs | None, rounds: int
) -> NDArray[np.float64]:
    """[ROWS]: dw (H + own moments) dw after some refinements that know `own`."""
    integers, scales = gptq(weight, moments(likely), 16, LEVELS, own, rounds)
    off = (integers * np.repeat(scales, 16, axis=1) - weight).astype(np.float64)
    every = own_inputs(likely, ROWS, NO_SCALE)
    return np.array(
        [o @ (moments(likely) + own_moment(every, row)) @ o for row, o in enumerate(off)]
    )


def test_refinement_knows_the_own_inputs(weight: NDArray[np.float32], likely: LikelyTokens) -> None:
    own = own_inputs(likely, ROWS, NO_SCALE)
    found = np.array([errors(weight, likely, own, rounds) for rounds in range(5)])
    assert (np.diff(found, axis=0) <= 1e-4 * found[:-1]).all()
    without = errors(weight, likely, None, 4)
    assert found[4].sum() < 0.9 * without.sum()
    assert found[4, -1] == pytest.approx(without[-1])  # no entry: the same as without


def test_moments_are_those_of_contexts_by_how_open_they_are(likely: LikelyTokens) -> None:
    scale = np.linspace(0.5, 2, INPUTS).astype(np.float32)
    own = own_inputs(likely, ROWS, scale)
    for row in range(ROWS):
        expected, total = np.zeros((INPUTS, INPUTS)), 0.0
        for x, tokens, probabilities in zip(
            likely.inputs / scale, likely.tokens, likely.probabilities, strict=True
        ):
            for p in probabilities[tokens == row].astype(np.float64):
                expected += p * (1 - p) * np.outer(x, x)
                total += p * (1 - p)
        expected *= OWN_SHARE / (total + 4)
        np.testing.assert_allclose(own_moment(own, row), expected, rtol=1e-4, atol=1e-5)
    some = own.of(slice(3, 9))
    for row in range(6):
        np.testing.assert_array_equal(own_moment(some, row), own_moment(own, 3 + row))


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_head_asks_for_them(
    tied: bool, weight: NDArray[np.float32], likely: LikelyTokens
) -> None:
    asked = []

    def ask() -> LikelyTokens:
        asked.append(True)
        return likely

    moment = moments(likely).astype(np.float32)
    with_them = GptqQuantizer(lambda place: moment, tied=tied, likely=ask)
    without = GptqQuantizer(lambda place: moment, tied=tied, likely=lambda: None)
    head = "transformer.wte.weight" if tied else "lm_head.weight"
    other = "transformer.h.0.mlp.c_fc.weight" if tied else "transformer.wte.weight"
    for name in (other, head):
        assert not asked
        one, two = (q.int4(name, weight, 16).read_back() for q in (with_them, without))
        assert np.array_equal(one, two) == (name == other)
    assert asked == [True]
