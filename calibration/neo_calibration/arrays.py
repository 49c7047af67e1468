"""Writes safetensors files deterministically, without a second copy of the arrays."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["write_arrays", "write_whole"]

_TYPES = {"float32": "F32", "int32": "I32"}


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.float32] | NDArray[np.int32]]) -> None:
    """Write float32 and int32 arrays to one safetensors file, in this order, with atomic rename.

    Format: https://huggingface.co/docs/safetensors#format.
    """
    header, position = {}, 0
    for name, array in arrays.items():
        end = position + 4 * array.size
        header[name] = {
            "dtype": _TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file with atomic rename."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
