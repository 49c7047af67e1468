"""A cache folder for results that exports of one model under several plans share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.quantize.int4 import Int4Weight
from neo_export.quantize.int8 import Int8Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from neo_export.quantize.quantizer import WeightQuantizer

    Arrays = Mapping[str, NDArray[Any]]

__all__ = ["Remembered", "remembered_arrays"]


def remembered_arrays(
    folder: Path | None, name: str, make: Callable[[], Arrays]
) -> dict[str, NDArray[Any]]:
    """Read arrays from the folder, or make them and save them there.

    Args:
        folder: the cache of one set of statistics, which are one checkpoint's; None for no cache.
        name: the file's name without its extension: everything else that the arrays depend on.
        make: computes the arrays.
    """
    if folder is None:
        return dict(make())
    path = Path(folder) / f"{name}.npz"
    if not path.exists():
        _save(path, make())
    with np.load(path) as arrays:
        return dict(arrays)


class Remembered:
    """A quantizer that caches the results of another one in a folder.

    The folder belongs to one set of statistics. The key of a file is the matrix's name, its values
    and its storage.
    """

    def __init__(self, quantizer: WeightQuantizer, folder: Path) -> None:
        self._quantizer = quantizer
        self._folder = folder

    def int8(self, name: str, weight: NDArray[np.float32]) -> Int8Weight:
        """See `WeightQuantizer.int8`."""

        def make() -> Arrays:
            made = self._quantizer.int8(name, weight)
            return {"integers": made.integers, "scales": made.scales}

        arrays = remembered_arrays(self._folder, _named(name, weight, "int8"), make)
        return Int8Weight(arrays["integers"], arrays["scales"])

    def int4(self, name: str, weight: NDArray[np.float32], block_size: int) -> Int4Weight:
        """See `WeightQuantizer.int4`."""

        def make() -> Arrays:
            made = self._quantizer.int4(name, weight, block_size)
            return {"integers": made.packed, "scales": made.scales}

        arrays = remembered_arrays(self._folder, _named(name, weight, f"int4-{block_size}"), make)
        return Int4Weight(arrays["integers"], arrays["scales"])


def _named(name: str, weight: NDArray[np.float32], storage: str) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(weight).data).hexdigest()
    return f"{name}.{storage}.{digest[:32]}"


def _save(path: Path, arrays: Arrays) -> None:
    part, named = path.with_suffix(".part"), dict[str, Any](arrays)
    with part.open("wb") as file:
        np.savez(file, **named)
    part.replace(path)  # atomic rename
