"""Quantized matrices kept in a folder, for exports of one model under several plans."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neo_export.quantize.int4 import Int4Weight
from neo_export.quantize.int8 import Int8Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["Remembered"]


class Remembered:
    """A quantizer that looks into a folder first, and leaves there what it had to make.

    The folder belongs to one set of statistics. A file is found by the matrix's name, its values
    and its storage.
    """

    def __init__(self, quantizer: WeightQuantizer, folder: Path) -> None:
        self._quantizer = quantizer
        self._folder = Path(folder)

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """See `WeightQuantizer.int8`."""
        path = self._path(name, weight, "int8")
        if not path.exists():
            made = self._quantizer.int8(name, weight)
            _save(path, made.integers, made.scales)
        with np.load(path) as arrays:
            return Int8Weight(arrays["integers"], arrays["scales"])

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> Int4Weight:
        """See `WeightQuantizer.int4`."""
        path = self._path(name, weight, f"int4-{block_size}")
        if not path.exists():
            made = self._quantizer.int4(name, weight, block_size)
            _save(path, made.packed, made.scales)
        with np.load(path) as arrays:
            return Int4Weight(arrays["integers"], arrays["scales"])

    def _path(self, name: str, weight: NDArray[np.float32], storage: str) -> Path:
        digest = hashlib.sha256(np.ascontiguousarray(weight).data).hexdigest()
        return self._folder / f"{name}.{storage}.{digest[:32]}.npz"


def _save(
    path: Path, integers: NDArray[np.int8] | NDArray[np.uint8], scales: NDArray[np.float32]
) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, integers=integers, scales=scales)
    part.replace(path)  # whole or not at all
