"""How numbers become integers and scales, against unpacking of our own and onnxruntime's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from helpers.running import SILENT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from neo_export.quantize.int4 import (
    BLOCK_SIZES,
    Int4Weight,
    check_block_size,
    dequantize_int4,
    quantize_int4,
)
from neo_export.quantize.int8 import LIMIT, dequantize_int8, quantize_int8
from neo_runtime.errors import RequestError
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMBERS = st.floats(-1e4, 1e4, width=32).map(lambda x: 0.0 if abs(x) < 1e-4 else x)
MATRICES = st.integers(1, 3).flatmap(
    lambda rows: arrays(np.float32, (rows, 64), elements=NUMBERS | st.floats(-1, 1, width=16))
)


def normal(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def plain_int8(weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rounded by max|w| / 63 a row."""
    wide = weight.astype(np.float64)
    scale = np.abs(wide).max(axis=1, keepdims=True) / LIMIT
    scale[scale == 0] = 1
    return np.rint(wide / scale) * scale


def plain_int4(weight: NDArray[np.float32], block_size: int) -> NDArray[np.float64]:
    """Rounded by the weight of the largest size / −8 a block."""
    blocks = weight.astype(np.float64).reshape(-1, block_size)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)][:, None]
    scale = np.where(largest == 0, 1, largest / -8)
    return (np.clip(np.rint(blocks / scale), -8, 7) * scale).reshape(weight.shape)


def unpack(stored: Int4Weight) -> NDArray[np.float64]:
    """A number at a time: byte i of a block holds weight 2i in its low half, 2i + 1 in its high."""
    rows, blocks, half = stored.packed.shape
    found = np.empty((rows, blocks, 2 * half))
    for row in range(rows):
        for block in range(blocks):
            for at, byte in enumerate(stored.packed[row, block].tolist()):
                low, high = byte % 16, byte // 16
                found[row, block, 2 * at] = low - 8
                found[row, block, 2 * at + 1] = high - 8
            found[row, block] *= float(stored.scales[row, block])
    return found.reshape(rows, -1)


def error(found: NDArray[Any], weight: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Sum of squares of each group."""
    off = (found.astype(np.float64) - weight).reshape(-1, size)
    return np.einsum("ij,ij->i", off, off)


@settings(deadline=None, max_examples=60)
@given(MATRICES)
def test_int8_is_never_worse_than_plain_rounding(weight: NDArray[np.float32]) -> None:
    found = error(dequantize_int8(weight), weight, 64)
    # Two candidates that are equal but for float32 rounding may be taken for one another.
    slack = 1e-7 * np.einsum("ij,ij->i", weight.astype(np.float64), weight)
    assert (found <= error(plain_int8(weight), weight, 64) * (1 + 1e-4) + slack).all()


@settings(deadline=None, max_examples=60)
@given(MATRICES, st.sampled_from([16, 32, 64]))
def test_int4_is_never_worse_than_plain_rounding(
    weight: NDArray[np.float32], block_size: int
) -> None:
    found = error(dequantize_int4(weight, block_size), weight, block_size)
    blocks = weight.astype(np.float64).reshape(-1, block_size)
    slack = 1e-7 * np.einsum("ij,ij->i", blocks, blocks)
    limit = error(plain_int4(weight, block_size), weight, block_size)
    assert (found <= limit * (1 + 1e-4) + slack).all()


def test_searched_scales_are_better() -> None:
    weight = normal(64, 256)
    found, plain = dequantize_int8(weight), plain_int8(weight)
    assert error(found, weight, 256).sum() < 0.995 * error(plain, weight, 256).sum()
    for block_size in (32, 64):
        found = error(dequantize_int4(weight, block_size), weight, block_size).sum()
        assert found < 0.93 * error(plain_int4(weight, block_size), weight, block_size).sum()


@settings(deadline=None, max_examples=30)
@given(MATRICES)
def test_int8_uses_seven_bits(weight: NDArray[np.float32]) -> None:
    stored = quantize_int8(weight)
    assert stored.integers.dtype == np.int8
    assert stored.integers.shape == weight.shape
    assert stored.scales.shape == (len(weight),)
    assert np.abs(stored.integers.astype(int)).max() <= LIMIT == 63
    assert (stored.scales > 0).all()
    expected = stored.integers.astype(np.float64) * stored.scales.astype(np.float64)[:, None]
    assert np.allclose(dequantize_int8(weight), expected, rtol=1e-6, atol=0)


def test_int8_reaches_its_limit_on_both_sides() -> None:
    weight = np.tile(np.array([-1.0, 1.0], np.float32), (2, 32))
    stored = quantize_int8(weight)
    assert {int(n) for n in stored.integers.ravel()} == {-63, 63}
    assert np.allclose(dequantize_int8(weight), weight, rtol=1e-6)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_int4_layout(block_size: int) -> None:
    weight = normal(5, 512)
    stored = quantize_int4(weight, block_size)
    assert stored.packed.dtype == np.uint8
    assert stored.packed.shape == (5, 512 // block_size, block_size // 2)
    assert stored.scales.shape == (5, 512 // block_size)
    assert np.allclose(dequantize_int4(weight, block_size), unpack(stored), rtol=1e-6, atol=0)


def test_int4_order_of_halves() -> None:
    """Weights that are −8…7 times a scale come back, each in its place."""
    integers = np.concatenate([np.arange(-8, 8), np.arange(7, -9, -1)])
    weight = (integers * 0.25).astype(np.float32)[None]
    stored = quantize_int4(weight, 32)
    assert stored.scales.tolist() == [[0.25]]
    assert stored.packed[0, 0, 0] == (1 << 4 | 0)  # −8 below, −7 above
    assert np.array_equal(unpack(stored), weight)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_scale_has_the_sign_that_gives_the_largest_weight_the_ninth_level(sign: int) -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, 3], weight[0, 9] = sign * 8.0, -sign * 7.0
    stored = quantize_int4(weight, 16)
    assert np.sign(stored.scales[0, 0]) == -sign
    assert np.allclose(dequantize_int4(weight, 16), weight, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    weight = normal(4, 64)
    weight[1] = 0
    weight[2, :32] = 0
    for found in (dequantize_int8(weight), dequantize_int4(weight, 32)):
        assert np.isfinite(found).all()
        assert not found[1].any()
        assert found[0].any()
    assert not dequantize_int4(weight, 32)[2, :32].any()


def test_every_group_has_a_scale_of_its_own() -> None:
    """A group does not depend on its neighbours, nor on how the work was cut into slabs."""
    weight = normal(700, 256)  # more than one slab
    int8, int4 = dequantize_int8(weight), dequantize_int4(weight, 32)
    for row in (0, 511, 512, 699):
        assert np.array_equal(dequantize_int8(weight[row : row + 1])[0], int8[row])
        assert np.array_equal(
            dequantize_int4(weight[row : row + 1, 32:64], 32)[0], int4[row, 32:64]
        )


def test_block_sizes() -> None:
    for size in BLOCK_SIZES:
        check_block_size(size, 512, "w")
    check_block_size(64, 192, "w")
    with pytest.raises(
        RequestError, match=r"block size 128 .* wte.*192 inputs; use one of 16, 32, 64$"
    ):
        check_block_size(128, 192, "wte")
    with pytest.raises(RequestError, match=r"block size 8 .*use one of 16, 32$"):
        check_block_size(8, 96, "w")
    with pytest.raises(RequestError, match=r"36 inputs; export with --int8"):
        check_block_size(32, 36, "w")


def run_node(
    node: Any, constants: dict[str, NDArray[Any]], feed: NDArray[Any]
) -> NDArray[np.float32]:
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kinds[feed.dtype], feed.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: NDArray[np.float32] = session.run(None, {"x": feed})[0]
    return result


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_onnxruntime_reads_int4_alike(block_size: int) -> None:
    rows, columns = 24, 256
    weight = normal(rows, columns)
    stored = quantize_int4(weight, block_size)
    expected = dequantize_int4(weight, block_size)
    product = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=4,
        block_size=block_size,
        accuracy_level=0,
    )
    constants = {"w": stored.packed, "s": stored.scales}
    found = run_node(product, constants, np.eye(columns, dtype=np.float32))
    assert np.allclose(found.T, expected, rtol=1e-6, atol=1e-9)
    gather = helper.make_node(
        "GatherBlockQuantized",
        ["w", "x", "s"],
        ["y"],
        domain="com.microsoft",
        bits=4,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    constants = {"w": stored.packed.reshape(rows, -1), "s": stored.scales}
    found = run_node(gather, constants, np.arange(rows))
    assert np.array_equal(found, expected)


def test_onnxruntime_reads_int8_alike() -> None:
    weight = normal(24, 64)
    stored = quantize_int8(weight)
    product = helper.make_node(
        "MatMulIntegerToFloat", ["q", "w", "one", "s", "zero"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [product],
        "one",
        [helper.make_tensor_value_info("q", TensorProto.UINT8, [64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ascontiguousarray(stored.integers.T), "w"),
            numpy_helper.from_array(stored.scales, "s"),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    unit = (128 + np.eye(64)).astype(np.uint8)
    found = session.run(None, {"q": unit})[0]
    assert np.array_equal(found.T, dequantize_int8(weight))
