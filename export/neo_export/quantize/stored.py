"""The checkpoint's weights once a bundle has stored them: the reference to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from neo_export.quantize.int4 import dequantize_int4
from neo_export.quantize.int8 import dequantize_int8

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["StoredWeights", "is_kept"]

_POSITIONS = "wpe.weight"


def is_kept(name: str | None, keep: tuple[str, ...]) -> bool:
    """Whether a weight is among those that stay wide, by shell pattern."""
    return name is not None and any(fnmatchcase(name, pattern) for pattern in keep)


@dataclass(frozen=True)
class StoredWeights:
    """Reads weights as one graph of a bundle has them, in float32.

    float16 bundles are compared with the checkpoint itself: their rounding is what is judged.
    """

    read: Callable[[str], NDArray[np.float32]]
    """Reads a weight of the checkpoint."""
    precision: str
    """Of the graph: "fp32", "fp16", "int8" or "int4"."""
    block_size: int | None = None
    keep: tuple[str, ...] = ()

    def __call__(self, name: str) -> NDArray[np.float32]:
        """The weight of this name, quantized and read back where the bundle quantizes it."""
        weight = self.read(name)
        if self.precision not in ("int8", "int4") or weight.ndim != 2:
            return weight
        if name.endswith(_POSITIONS):
            return weight.astype(np.float16).astype(np.float32)
        if is_kept(name, self.keep):
            return weight
        if self.precision == "int8":
            return dequantize_int8(weight)
        assert self.block_size is not None
        return dequantize_int4(weight, self.block_size)
