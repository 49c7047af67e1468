"""The protocol of weight quantizers, which compute a matrix's integers and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from neo_export.quantize.int4 import quantize_int4
from neo_export.quantize.int8 import quantize_int8

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neo_export.quantize.int4 import Int4Weight
    from neo_export.quantize.int8 import Int8Weight

__all__ = ["EightBits", "RoundToNearest", "WeightQuantizer"]


class WeightQuantizer(Protocol):
    """Quantizes a matrix, given its name; deterministic."""

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """Quantize [out, in] with one scale per row."""

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> Int4Weight:
        """Quantize [out, in] with a scale for each `block_size` consecutive inputs of a row."""


class RoundToNearest:
    """Rounds to the nearest level, with scales of least squared error; needs no calibration."""

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """See `neo_export.quantize.int8`."""
        return quantize_int8(weight)

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> Int4Weight:
        """See `neo_export.quantize.int4`."""
        return quantize_int4(weight, block_size)


class EightBits(RoundToNearest):
    """The same with all eight bits of int8, for kernels that multiply in floating point."""

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """See `neo_export.quantize.int8`; integers from -127 to 127."""
        return quantize_int8(weight, limit=127)
