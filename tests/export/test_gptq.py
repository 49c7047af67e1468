"""GPTQ: the algorithm against the form that its paper gives, and what it is for: output error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from neo_export.quantize.gptq import damped, gptq
from neo_export.quantize.gptq_quantizer import GptqQuantizer
from neo_export.quantize.int4 import INT4_LEVELS, dequantize_int4
from neo_export.quantize.int8 import LIMIT, dequantize_int8
from neo_export.quantize.levels import Levels

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAIN = Levels(-8, 7, (1.0,))
SEARCHED = Levels(-8, 7, (1.0, 1.1, 0.9, 0.8))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(channels: int, seed: int = 1) -> NDArray[np.float32]:
    """Second moments of inputs as models have them: few strong directions, some loud channels."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(channels, channels)) * np.arange(1, channels + 1) ** -0.5
    x = generator.normal(size=(4 * channels, channels)) @ mixing.T
    x *= generator.lognormal(0, 0.7, channels)
    result: NDArray[np.float32] = (x.T @ x / len(x)).astype(np.float32)
    return result


def read_back(
    integers: NDArray[np.int8], scales: NDArray[np.float32], size: int
) -> NDArray[np.float32]:
    return integers * np.repeat(scales, size, axis=1)


def row_errors(weight: Any, found: Any, moment: Any) -> NDArray[np.float64]:
    """E‖dW x‖² of each row: the diagonal of dW H dWᵀ, in float64."""
    off = found.astype(np.float64) - weight
    return np.diagonal(off @ moment @ off.T)


def total_error(weight: Any, found: Any, moment: Any) -> float:
    """tr(dW H dWᵀ)."""
    return float(row_errors(weight, found, moment).sum())


def as_in_the_paper(
    weight: NDArray[np.float32], moment: NDArray[np.float64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Algorithm 1 of arXiv:2210.17323, a column at a time: through the inverse of H.

    A block's scale is that of plain rounding of what the columns are when the block begins.
    """
    left = weight.astype(np.float64).copy()
    upper = np.linalg.cholesky(np.linalg.inv(moment)).T
    integers = np.zeros(weight.shape, np.int64)
    scales = np.zeros((len(weight), weight.shape[1] // size))
    for column in range(weight.shape[1]):
        block = column // size
        if column % size == 0:
            group = left[:, column : column + size]
            at = np.abs(group).argmax(axis=1)
            scales[:, block] = group[np.arange(len(group)), at] / -8
        scale = scales[:, block]
        integers[:, column] = np.clip(np.rint(left[:, column] / scale), -8, 7)
        error = (left[:, column] - integers[:, column] * scale) / upper[column, column]
        left[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    return integers, scales


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_same_integers_as_the_paper_gives(size: int) -> None:
    weight, moment = normal(40, 128), damped(correlated(128))
    integers, scales = gptq(weight, moment, size, PLAIN, rounds=0)
    expected, expected_scales = as_in_the_paper(weight, moment, size)
    # float32 against float64: a number in the middle of two may go either way, and what follows
    # in its row with it.
    same = (integers == expected).all(axis=1)
    assert same.mean() > 0.9
    assert np.allclose(scales[same], expected_scales[same], rtol=1e-4)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_outputs_are_nearer_than_by_rounding(size: int) -> None:
    weight, moment = normal(24, 256), damped(correlated(256))
    rounded = total_error(weight, dequantize_int4(weight, size), moment)
    once = read_back(*gptq(weight, moment, size, SEARCHED, rounds=0), size)
    refined = read_back(*gptq(weight, moment, size, SEARCHED), size)
    errors = [total_error(weight, found, moment) for found in (once, refined)]
    assert errors[0] < 0.6 * rounded
    assert errors[1] < 0.95 * errors[0]


def test_every_refinement_lowers_the_error() -> None:
    weight, moment = normal(24, 128), damped(correlated(128))
    found = [read_back(*gptq(weight, moment, 32, SEARCHED, rounds=n), 32) for n in range(5)]
    errors = np.array([row_errors(weight, one, moment) for one in found])
    assert (np.diff(errors, axis=0) <= 1e-4 * errors[:-1]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_rows_do_not_depend_on_each_other() -> None:
    """Nor on how they were cut into slabs."""
    weight, moment = normal(50, 64), damped(correlated(64))
    integers, scales = gptq(weight, moment, 16, SEARCHED)
    some, their_scales = gptq(weight[7:21], moment, 16, SEARCHED)
    # Sums over a slab of another width may round otherwise, and a tie falls the other way.
    same = (integers[7:21] == some).all(axis=1)
    assert same.mean() > 0.9
    assert np.allclose(scales[7:21][same], their_scales[same], rtol=1e-4)


def test_zeros_and_silent_channels() -> None:
    weight = normal(8, 64)
    weight[2], weight[3, :32] = 0, 0
    moment = correlated(64)
    moment[5], moment[:, 5] = 0, 0
    for second in (moment, np.zeros_like(moment)):
        integers, scales = gptq(weight, damped(second), 32, SEARCHED)
        assert np.isfinite(scales).all()
        assert not integers[2].any()
        assert integers[0].any()
        assert integers.min() >= -8
        assert integers.max() <= 7


def test_int8() -> None:
    weight, moment = normal(24, 256), correlated(256)
    quantizer = GptqQuantizer(lambda place: moment, tied=True)
    stored = quantizer.int8("transformer.h.0.mlp.c_fc.weight", weight)
    assert np.abs(stored.integers.astype(int)).max() <= LIMIT
    assert (stored.scales > 0).all()
    assert stored.scales.shape == (24,)
    found = total_error(weight, stored.read_back(), moment)
    assert found < 0.5 * total_error(weight, dequantize_int8(weight), moment)


def test_which_place_a_matrix_reads() -> None:
    """Queries, keys and values share one; a table that is no head is only looked up."""
    asked: list[str] = []

    def second_moment(place: str) -> NDArray[np.float32]:
        asked.append(place)
        return correlated(32)

    weight = normal(12, 32)
    tied = GptqQuantizer(second_moment, tied=True)
    packed = "transformer.h.3.attn.attention.qkv_proj.weight"
    for name in (packed, "transformer.h.1.mlp.c_proj.weight", "transformer.wte.weight"):
        tied.int4(name, weight, 16)
    assert asked == ["transformer.h.3.ln_1", "transformer.h.1.gelu", "transformer.final_norm"]
    untied = GptqQuantizer(second_moment, tied=False)
    table = untied.int4("transformer.wte.weight", weight, 16)
    assert np.array_equal(table.read_back(), dequantize_int4(weight, 16))
    assert len(asked) == 3
    untied.int4("lm_head.weight", weight, 16)
    assert asked[3:] == ["transformer.final_norm"]


def test_a_table_with_scales_minds_what_is_looked_up() -> None:
    """A row is divided by the scales where it is read: its error there is ‖(W − Q) / s‖²."""
    weight, moment = normal(12, 32), correlated(32)
    scale = np.exp(normal(32, seed=2))
    found = GptqQuantizer(lambda place: moment, tied=True, table_scale=scale).int4(
        "transformer.wte.weight", weight, 16
    )
    head = damped(moment)
    # The head reads x / s: what the inputs before s have is s² times as much.
    share = 0.2 * np.mean(scale.astype(np.float64) ** 2 * np.diagonal(head))
    looked_up = np.diag(share / scale.astype(np.float64) ** 2)
    integers, scales = gptq(weight, head + looked_up, 16, INT4_LEVELS)
    expected = integers.reshape(12, 2, 16) * scales[:, :, None]
    np.testing.assert_array_equal(found.read_back(), expected.reshape(12, 32))


def test_moments_that_are_off_by_more_than_the_damping() -> None:
    """As of inputs about a large mean, in float32: indefinite, and still of use."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(4000, 32))
    weight = rng.normal(size=(8, 32)).astype(np.float32)
    right = damped(inputs.T @ inputs / len(inputs))
    noise = rng.normal(size=right.shape)
    for size in (0.05, 0.5, 5.0):
        wrong = right + size * (noise + noise.T)
        integers, scales = gptq(weight, wrong, 16, SEARCHED)
        assert np.isfinite(scales).all()
        stored = (integers.reshape(8, 2, 16) * scales[:, :, None]).reshape(8, 32)
        assert np.linalg.norm(stored - weight) < 0.3 * np.linalg.norm(weight)
