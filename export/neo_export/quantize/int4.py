"""int4: a signed scale for each block of consecutive inputs, integers from −8 to 7.

The scale may be negative: its sign is chosen so that the block's largest weight is stored on the
negative side, which has one more level (−8). The zero point is always 8, so none are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_runtime.errors import RequestError

from neo_export.quantize._rounding import in_slabs, search_scale
from neo_export.quantize.levels import Levels

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BLOCK_SIZES",
    "INT4_LEVELS",
    "Int4Weight",
    "check_block_size",
    "dequantize_int4",
    "pack_int4",
    "largest_block_size",
    "quantize_int4",
]

BLOCK_SIZES = (16, 32, 64, 128, 256)
INT4_LEVELS = Levels(-8, 7, (1.0, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75))


@dataclass(frozen=True)
class Int4Weight:
    """A matrix in int4, in the layout of com.microsoft.MatMulNBits."""

    packed: NDArray[np.uint8]
    """[out, in / block, block / 2]: a byte holds two integers + 8, the first in the low half."""
    scales: NDArray[np.float32]
    """[out, in / block]; weight = integer · scale of its block."""

    def read_back(self) -> NDArray[np.float32]:
        """The dequantized matrix, [out, in]."""
        rows, blocks, half = self.packed.shape
        integers = np.empty((rows, blocks, 2 * half), np.float32)
        integers[..., 0::2] = self.packed & 15
        integers[..., 1::2] = self.packed >> 4
        result: NDArray[np.float32] = (integers - 8) * self.scales[..., None]
        return result.reshape(rows, -1)


def check_block_size(block_size: int, width: int, name: str) -> None:
    """Refuse a block size that the operators do not support, or that does not divide the width.

    Raises:
        RequestError: the block size is refused; the message lists the possible sizes.
    """
    if block_size not in BLOCK_SIZES or width % block_size:
        fitting = [str(size) for size in BLOCK_SIZES if width % size == 0]
        raise RequestError(
            f"block size {block_size} does not fit {name}, which has {width} inputs; "
            + (f"use one of {', '.join(fitting)}" if fitting else "export with --int8")
        )


def largest_block_size(widths: tuple[int, ...], other: str = "--int8") -> int:
    """The largest usual block size (up to 128) that divides every width.

    128 is the default of GPTQ, AWQ and OpenVINO; fewer scales are fewer bytes per token.

    Args:
        widths: numbers of inputs of the matrices.
        other: the option that the error suggests if no size fits.

    Raises:
        RequestError: no block size divides every width.
    """
    for size in (128, 64, 32, 16):
        if not any(width % size for width in widths):
            return size
    raise RequestError(
        f"no block size divides all of the widths {', '.join(map(str, widths))}; "
        f"export with {other}"
    )


def quantize_int4(weight: NDArray[np.float32], block_size: int) -> Int4Weight:
    """Quantize [out, in] in blocks along `in`, by least squared error."""
    rows, columns = weight.shape
    packed, scales = in_slabs(weight, lambda slab: _quantize(slab, block_size))
    blocks = columns // block_size
    return Int4Weight(packed.reshape(rows, blocks, block_size // 2), scales.reshape(rows, blocks))


def dequantize_int4(weight: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """The matrix [out, in], quantized and dequantized."""
    return quantize_int4(weight, block_size).read_back()


def pack_int4(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """[…, n] integers −8…7 → [..., n / 2] bytes, the first of each pair in the low half."""
    pairs = (integers + np.int8(8)).astype(np.uint8).reshape(*integers.shape[:-1], -1, 2)
    packed: NDArray[np.uint8] = np.left_shift(pairs[..., 1], 4, dtype=np.uint8)
    return packed | pairs[..., 0]


def _quantize(
    slab: NDArray[np.float32], block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    blocks = slab.reshape(-1, block_size)
    at = np.abs(blocks).argmax(axis=1, keepdims=True)
    base = np.take_along_axis(blocks, at, axis=1) / np.float32(INT4_LEVELS.low)
    base[base == 0] = 1
    low, high = INT4_LEVELS.low, INT4_LEVELS.high
    scale = search_scale(blocks, base, low, high, INT4_LEVELS.factors)
    integers = np.clip(np.rint(blocks / scale), low, high).astype(np.int8)
    return pack_int4(integers.reshape(len(slab), -1)), scale.reshape(len(slab), -1)
