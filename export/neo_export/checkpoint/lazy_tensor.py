"""A tensor of a checkpoint with lazy loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["FLOAT_DTYPES", "LazyTensor", "check_finite", "numpy_dtype"]

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
"""Element types that a weight may have."""

# Elements per step of a streaming pass: a few MB of temporaries whatever the tensor's size.
_CHUNK = 1 << 20


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Dtype of a numpy name; "bfloat16" is that of `ml_dtypes`."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """Name, shape and element type of a tensor, and a function that loads its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A numpy name ("float32", "float16", "bfloat16"), or the file's own name of another type."""
    load: Callable[[], npt.NDArray[Any]]
    """Returns the values as stored; a view of the memory-mapped file if the format allows it."""

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total

    def read_raw(self) -> npt.NDArray[Any]:
        """The values in the stored type (bfloat16 as `ml_dtypes.bfloat16`), read-only, `shape`."""
        array = self.load()
        array.flags.writeable = False
        return array

    def read(self) -> npt.NDArray[np.float32]:
        """The values as float32, `shape`, read-only; a view of the file if it holds float32.

        float16 and bfloat16 are converted (exactly) to float32 in new memory.
        """
        raw = self.read_raw()
        # onnx and onnxruntime need aligned data, and data in a file may be unaligned.
        array: npt.NDArray[np.float32] = np.require(raw, np.float32, "A")
        array.flags.writeable = False
        return array

    def check_finite(self) -> None:
        """Check every value, a few MB at a time.

        Raises:
            CheckpointError: there is a NaN or an infinity; the message has their number.
        """
        check_finite(self.name, self.read_raw())

    def same_values(self, other: LazyTensor) -> bool:
        """Whether shape and all values (as bit patterns in float32) are equal."""
        if self.shape != other.shape:
            return False
        one, two = self.read_raw().reshape(-1), other.read_raw().reshape(-1)
        return all(
            np.array_equal(
                one[start : start + _CHUNK].astype(np.float32).view(np.uint32),
                two[start : start + _CHUNK].astype(np.float32).view(np.uint32),
            )
            for start in range(0, one.size, _CHUNK)
        )


def check_finite(name: str, array: npt.NDArray[Any]) -> None:
    """Raise `CheckpointError`, with name and number, if `array` holds a NaN or an infinity.

    Args:
        name: the tensor's name in the error.
        array: any floating-point type, any shape, contiguous.
    """
    flat = array.reshape(-1)
    bad = nan = 0
    first: int | None = None
    for start in range(0, flat.size, _CHUNK):
        finite = np.isfinite(flat[start : start + _CHUNK])
        if finite.all():
            continue
        bad += int(finite.size - np.count_nonzero(finite))
        nan += int(np.count_nonzero(np.isnan(flat[start : start + _CHUNK])))
        if first is None:
            first = start + int(np.argmin(finite))
    if first is not None:
        index = [int(i) for i in np.unravel_index(first, array.shape)]
        raise CheckpointError(
            f"tensor {name!r} has {bad} of {flat.size} values that are not finite ({nan} NaN, "
            f"{bad - nan} infinite; the first at {index}); expected numbers only. The file is "
            "damaged or the training diverged: export another checkpoint"
        )
