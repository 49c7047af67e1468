"""int8, int4 and fp8 for QuantizeLinear and DequantizeLinear: symmetric, scales > 0.

Products are computed in floating point or by tensor cores that do not saturate, so int8 uses all
levels that have a negative counterpart, −127 to 127. int4 has a scale per block of consecutive
inputs, and integers from −8 to 7. fp8 is E4M3 (OCP 8-bit floating point, 1.0): 448 is its largest
number. Scales are float16, the type of the activations; weights are divided by the rounded scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from neo_export.quantize._rounding import in_slabs, search_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEVELS", "LinearQuantizer", "LinearWeight", "quantize_linear"]

LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The largest number of each format that has a negative counterpart."""
_LOW = {"int8": -127, "int4": -8}
_FACTORS = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8)
_SMALLEST = np.float32(2.0**-14)
"""float16's smallest normal number: a smaller scale would have fewer than 11 bits of precision."""


@dataclass(frozen=True)
class LinearWeight:
    """A quantized matrix."""

    values: NDArray[Any]
    """[out, in]: int8 (also for int4, then −8 to 7), or float8_e4m3fn."""
    scales: NDArray[np.float16]
    """[out, in / block], or [out, 1] with one scale per row; weight = values · scale."""
    distance: float
    """‖W − stored‖ / ‖W‖."""

    def read_back(self) -> NDArray[np.float32]:
        """The matrix as products see it, [out, in]."""
        rows, columns = self.values.shape
        groups = self.values.astype(np.float32).reshape(rows, self.scales.shape[1], -1)
        return (groups * self.scales.astype(np.float32)[..., None]).reshape(rows, columns)


def quantize_linear(
    weight: NDArray[np.float32], kind: str, block_size: int | None = None
) -> LinearWeight:
    """Quantize [out, in].

    Args:
        weight: the matrix.
        kind: "int8", "int4" or "fp8".
        block_size: consecutive inputs of a row that share a scale; None for the whole row.
            Scales of integers are those of least squared error near max|w| / level.
    """
    group = block_size or weight.shape[1]
    values, scales, squares = in_slabs(weight, lambda slab: _quantize(slab, kind, group))
    off, size = squares.sum(axis=0)
    return LinearWeight(values, scales, float(np.sqrt(off / size)) if size else 0.0)


def _quantize(
    slab: NDArray[np.float32], kind: str, group: int
) -> tuple[NDArray[Any], NDArray[np.float16], NDArray[np.float64]]:
    """Values, scales, and each row's squared error and squared norm."""
    groups = slab.reshape(-1, group)
    base = np.abs(groups).max(axis=1, keepdims=True) / np.float32(LEVELS[kind])
    base[base == 0] = 1
    if kind == "fp8":
        scale = base
    else:
        scale = search_scale(groups, base, _LOW[kind], int(LEVELS[kind]), _FACTORS)
    stored = np.maximum(scale, _SMALLEST).astype(np.float16)
    wide = stored.astype(np.float32)
    scaled = groups / wide
    if kind == "fp8":
        limited = np.clip(scaled, -LEVELS[kind], LEVELS[kind])
        values: NDArray[Any] = limited.astype(ml_dtypes.float8_e4m3fn)
    else:
        values = np.clip(np.rint(scaled), _LOW[kind], LEVELS[kind]).astype(np.int8)
    off = (values.astype(np.float32) * wide - groups).reshape(slab.shape)
    squares = [np.square(each, dtype=np.float64).sum(axis=1) for each in (off, slab)]
    return values.reshape(slab.shape), stored.reshape(len(slab), -1), np.stack(squares, axis=1)


class LinearQuantizer:
    """The quantizer of these formats, for `neo_export.quantize.stored`."""

    def int8(self, name: str, weight: NDArray[np.float32]) -> LinearWeight:
        """One scale per row."""
        return quantize_linear(weight, "int8")

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> LinearWeight:
        """One scale per block."""
        return quantize_linear(weight, "int4", block_size)
