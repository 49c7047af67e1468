"""A memory-mapped safetensors file; its header is parsed here, and tensors are views of the file.

The layout (https://huggingface.co/docs/safetensors#format): 8 bytes with the header's length
(little-endian), the header (JSON: name → dtype, shape, data_offsets), then the data, which the
tensors cover without gap or overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import numpy as np
from neo_runtime.errors import CheckpointError
from neo_runtime.json_input import parse_json

from neo_export.checkpoint.lazy_tensor import LazyTensor, numpy_dtype

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["SafetensorsFile"]

# The limit of the safetensors library: a larger length is not from a valid file.
_MAX_HEADER = 100_000_000

_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class _Record:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One file, memory-mapped read-only.

    Attributes:
        path: the file.
        tensors: its tensors, by their names in the file. Arrays that were read stay valid after
            `close`: each keeps the mapping alive.
    """

    def __init__(self, path: Path) -> None:
        """Map `path` and check its header.

        Raises:
            CheckpointError: the file cannot be read, is truncated, or is not safetensors.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                records, start = _read_header(path, file, size)
            self._data: npt.NDArray[np.uint8] | None = np.asarray(
                np.memmap(path, dtype=np.uint8, mode="r")
            )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self.tensors: dict[str, LazyTensor] = {
            name: self._tensor(name, record, start) for name, record in records.items()
        }

    def close(self) -> None:
        """Release the mapping; reading a tensor afterwards raises `ValueError`."""
        self._data = None

    def _tensor(self, name: str, record: _Record, start: int) -> LazyTensor:
        def load() -> npt.NDArray[Any]:
            if self._data is None:
                raise ValueError(f"{self.path} is closed")
            data = self._data[start + record.begin : start + record.end]
            return data.view(numpy_dtype(record.dtype)).reshape(record.shape)

        return LazyTensor(name, record.shape, record.dtype, load)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, _Record], int]:
    """Records by name, and the offset where the data starts."""
    prefix = file.read(8)
    if prefix == b"version ":
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {size} bytes, and its header claims "
            f"{length}; download or save it again"
        )
    try:
        header = parse_json(file.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"it holds a {type(header).__name__}")
        header.pop("__metadata__", None)
        records = {name: _parse_record(name, entry) for name, entry in header.items()}
        _check_cover(records)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the safetensors header is damaged ({error}); download or save it again"
        ) from error
    expected = max((record.end for record in records.values()), default=0)
    if expected != size - 8 - length:
        state = "truncated" if expected > size - 8 - length else "longer than its header says"
        raise CheckpointError(
            f"{path} is {state}: {size - 8 - length} bytes of data, its header describes "
            f"{expected}; download or save it again"
        )
    return records, 8 + length


def _parse_record(name: str, entry: Any) -> _Record:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets):
        raise ValueError(f"tensor {name!r} lacks a dtype, shape or data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has data_offsets {offsets}")
    numpy_name, itemsize = _DTYPES.get(dtype, (dtype, 0))
    if itemsize and offsets[1] - offsets[0] != itemsize * math.prod(shape):
        raise ValueError(
            f"tensor {name!r} of shape {shape} and type {dtype} has "
            f"{offsets[1] - offsets[0]} bytes, expected {itemsize * math.prod(shape)}"
        )
    return _Record(numpy_name, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(records: dict[str, _Record]) -> None:
    position = 0
    for name, record in sorted(records.items(), key=lambda item: (item[1].begin, item[1].end)):
        if record.begin != position:
            raise ValueError(f"tensor {name!r} starts at {record.begin}, expected {position}")
        position = record.end
