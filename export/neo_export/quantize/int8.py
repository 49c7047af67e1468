"""int8: a scale for each output channel, integers from −63 to 63.

Only seven of the eight bits are used: the u8×s8 kernels of x86 CPUs without VNNI add two products
in a signed 16-bit register, and 2 · 255 · 64 = 32640 is the most that fits. With −127…127 they
saturate silently (docs/int8-saturation.md proves it with extreme values).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neo_export.quantize._rounding import in_slabs, search_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LIMIT", "Int8Weight", "dequantize_int8", "quantize_int8"]

LIMIT = 63
_FACTORS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in int8."""

    integers: NDArray[np.int8]
    """[out, in], −63 to 63 (−127 to 127 where the limit was 127)."""
    scales: NDArray[np.float32]
    """[out]; weight = integers · scales[:, None]."""

    def read_back(self) -> NDArray[np.float32]:
        """The dequantized matrix, [out, in]."""
        return self.integers.astype(np.float32) * self.scales[:, None]


def quantize_int8(weight: NDArray[np.float32], limit: int = LIMIT) -> Int8Weight:
    """Quantize [out, in]; a row's scale is that of least squared error near max|w| / limit."""
    integers, scales = in_slabs(weight, lambda rows: _quantize(rows, limit))
    return Int8Weight(integers, scales.reshape(-1))


def dequantize_int8(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The matrix [out, in], quantized and dequantized."""
    return quantize_int8(weight).read_back()


def _quantize(
    rows: NDArray[np.float32], limit: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    base = np.abs(rows).max(axis=1, keepdims=True) / np.float32(limit)
    base[base == 0] = 1
    scale = search_scale(rows, base, -limit, limit, _FACTORS)
    return np.clip(np.rint(rows / scale), -limit, limit).astype(np.int8), scale
