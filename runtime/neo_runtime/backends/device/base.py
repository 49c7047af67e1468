"""What a backend needs of a GPU: memory, copies in the order of one stream, and its size.

Addresses are plain integers. Everything with "queue" in its description happens in the order of
the device's stream, and is complete once `synchronize` returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "Device", "KernelCall", "Layout"]

ALIGNMENT = 256
"""Bytes: what cudaMalloc guarantees, and the most that a kernel wants."""


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """One launch."""

    grid: tuple[int, int, int]
    """Blocks."""
    threads: int
    """Of a block."""
    shared_bytes: int
    """Of a block."""
    arguments: tuple[tuple[int, int], ...]
    """Integers, each with its bytes: 4 or 8."""
    overlap: bool
    """The kernel may begin before the one before it has ended, for which it waits by itself."""


class Device(ABC):
    """One GPU, or what stands for one."""

    name: str
    """What onnxruntime calls its memory: "cuda", "cpu"."""
    index: int
    """Which of them."""

    def select(self) -> None:
        """Make it the one that libraries use in this thread, which may have used another."""
        return

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Address of `size` new bytes, aligned to `ALIGNMENT`; their contents are undefined.

        Raises:
            DeviceMemoryError: there are not so many.
        """

    @abstractmethod
    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""

    @abstractmethod
    def pinned(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of host memory that copies may read and write in the background."""

    @abstractmethod
    def unpin(self, array: NDArray[Any]) -> None:
        """Give back what `pinned` gave, by any view of its beginning."""

    @abstractmethod
    def zero(self, address: int, size: int) -> None:
        """Queue: write zeros."""

    @abstractmethod
    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue: copy a contiguous array to the device. It must not change until it is done."""

    @abstractmethod
    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue: copy from the device into a contiguous array."""

    @abstractmethod
    def copy_rows(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int
    ) -> None:
        """Queue: copy `rows` times `width` bytes inside the device, each a pitch further on."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was queued is done."""

    @abstractmethod
    def providers(self, *, capture: bool) -> list[Any]:
        """Onnxruntime's execution providers for this device, in its stream.

        Args:
            capture: kernels are recorded in a CUDA graph and replayed.
        """

    @property
    @abstractmethod
    def stream_handle(self) -> int:
        """The stream, as engines take it."""

    @abstractmethod
    def capture(self, queue: Callable[[], None]) -> Any:
        """Record what `queue` queues as a CUDA graph, without running it."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Queue: run a captured graph."""

    @abstractmethod
    def discard(self, graph: Any) -> None:
        """Give a captured graph back."""

    @abstractmethod
    def load_kernel(self, image: bytes, name: str, shared_bytes: int) -> Any:
        """A kernel of machine code.

        Args:
            image: a CUDA binary.
            name: of the kernel in it.
            shared_bytes: shared memory that a block of it takes.

        Raises:
            DeviceError: the device does not run it.
        """

    @abstractmethod
    def unload_kernel(self, kernel: Any) -> None:
        """Give a kernel back; nothing that is captured may launch it any more."""

    @abstractmethod
    def launch(self, kernel: Any, call: KernelCall) -> None:
        """Queue a kernel of `load_kernel`."""

    @abstractmethod
    def close(self) -> None:
        """Give the stream and the pinned memory back."""


class Layout:
    """Tensors one behind the other in one block of device memory."""

    def __init__(self) -> None:
        self.size = 0
        self._places: dict[str, tuple[int, Any, tuple[int, ...]]] = {}

    def add(self, name: str, dtype: Any, shape: Sequence[int], itemsize: int) -> None:
        """Append a tensor; `dtype` is what onnxruntime takes for its type."""
        self._places[name] = (self.size, dtype, tuple(shape))
        size = int(np.prod(shape, dtype=np.int64)) * itemsize
        self.size += -(-size // ALIGNMENT) * ALIGNMENT

    def offset(self, name: str) -> int:
        """Bytes before a tensor."""
        return self._places[name][0]

    def tensors(self, base: int) -> dict[str, tuple[int, Any, tuple[int, ...]]]:
        """Address, type and shape of each, for a block at the address `base`."""
        return {n: (base + at, dtype, shape) for n, (at, dtype, shape) in self._places.items()}
