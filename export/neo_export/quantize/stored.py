"""The checkpoint's weights as a bundle stores them, for the reference of comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from neo_export.quantize.half import fits_float16
from neo_export.quantize.linear import LinearQuantizer, quantize_linear
from neo_export.quantize.plan import is_planned
from neo_export.quantize.quantizer import RoundToNearest, WeightQuantizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from neo_export.quantize.plan import WeightPlan

__all__ = ["StoredWeights"]


@dataclass(frozen=True)
class StoredWeights:
    """Reads weights as one graph of a bundle has them, dequantized to float32.

    float16 bundles are compared with the checkpoint itself, so their rounding counts as error.
    """

    read: Callable[[str], NDArray[np.float32]]
    """Reads a weight of the checkpoint."""
    plan: WeightPlan
    """The storage of every matrix in the graph."""
    quantizer: WeightQuantizer | LinearQuantizer = field(default_factory=RoundToNearest)
    """Computes or reads the integers."""
    half_positions: bool = False
    """Whether the position table is stored in float16, if that can hold it."""

    def __call__(self, name: str) -> NDArray[np.float32]:
        """The weight of this name; quantized and dequantized if the bundle quantizes it."""
        weight = self.read(name)
        if not is_planned(name, weight.shape):
            if self.half_positions and weight.ndim == 2 and fits_float16(weight):
                return weight.astype(np.float16).astype(np.float32)
            return weight
        storage = self.plan.of(name)
        if storage.kind == "int8":
            return self.quantizer.int8(name, weight).read_back()
        if storage.kind == "fp8":
            return quantize_linear(weight, "fp8").read_back()
        if storage.kind == "int4":
            assert storage.block_size is not None
            return self.quantizer.int4(name, weight, storage.block_size).read_back()
        return weight
