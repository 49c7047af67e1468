"""The interface to a GPU: memory, one stream, CUDA graphs and kernels.

Addresses are plain integers. Methods whose description begins with "Queue" return at once; the work
runs in the order of the device's stream, and is complete once `synchronize` returns.
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
"""Alignment of allocations, in bytes: what cudaMalloc guarantees, and enough for any kernel."""


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """The parameters of one kernel launch."""

    grid: tuple[int, int, int]
    """Blocks in each dimension."""
    threads: int
    """Threads per block."""
    shared_bytes: int
    """Dynamic shared memory per block."""
    arguments: tuple[tuple[int, int], ...]
    """Integers, each with its size in bytes: 4, or 8 for addresses."""
    overlap: bool
    """Whether the kernel may start before the previous one has ended (programmatic dependent
    launch); it then waits for that one itself."""


class Device(ABC):
    """A GPU with one stream; tests use a device of host memory in its place."""

    name: str
    """onnxruntime's name for its memory: "cuda", or "cpu" in tests."""
    index: int
    """Device index."""

    def select(self) -> None:
        """Make it the current device of the calling thread, for libraries that use that."""
        return

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Allocate `size` bytes, aligned to `ALIGNMENT`, with undefined contents.

        Returns:
            The address.

        Raises:
            DeviceMemoryError: the device has too little free memory.
        """

    @abstractmethod
    def free(self, address: int) -> None:
        """Free memory of `allocate`."""

    @abstractmethod
    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Allocate `size` bytes of pinned host memory, for asynchronous copies.

        Raises:
            HostMemoryError: the host has too little memory to pin.
        """

    @abstractmethod
    def unpin(self, array: NDArray[Any]) -> None:
        """Free an array of `pinned`, given as it or any view that starts at its first byte."""

    @abstractmethod
    def zero(self, address: int, size: int) -> None:
        """Queue setting `size` bytes to zero."""

    @abstractmethod
    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy of a contiguous array to the device; it must not change until complete."""

    @abstractmethod
    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy from the device into a contiguous array."""

    @abstractmethod
    def copy_rows(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int
    ) -> None:
        """Queue a strided copy inside the device.

        Args:
            to: address of the first target row.
            to_pitch: bytes from one target row to the next.
            source: address of the first source row.
            pitch: bytes from one source row to the next.
            width: bytes to copy per row.
            rows: number of rows.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is complete."""

    @abstractmethod
    def providers(self, *, capture: bool) -> list[Any]:
        """The execution providers of onnxruntime for this device and its stream.

        Args:
            capture: whether runs are captured as CUDA graphs.
        """

    @property
    @abstractmethod
    def stream_handle(self) -> int:
        """The stream's handle, as engines expect it."""

    @abstractmethod
    def capture(self, queue: Callable[[], None]) -> Any:
        """Capture the work that `queue` queues as a CUDA graph, without running it."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Queue a captured graph."""

    @abstractmethod
    def discard(self, graph: Any) -> None:
        """Destroy a captured graph."""

    @abstractmethod
    def load_kernel(self, image: bytes, name: str, shared_bytes: int) -> Any:
        """Load a compiled kernel.

        Args:
            image: a CUDA binary.
            name: name of the kernel in the binary.
            shared_bytes: dynamic shared memory per block.

        Raises:
            DeviceMemoryError: the device has too little free memory.
            DeviceError: the device or its driver does not support the kernel.
        """

    @abstractmethod
    def unload_kernel(self, kernel: Any) -> None:
        """Unload a kernel. Captured graphs that launch it must have been discarded."""

    @abstractmethod
    def launch(self, kernel: Any, call: KernelCall) -> None:
        """Queue a launch of a kernel of `load_kernel`."""

    @abstractmethod
    def close(self) -> None:
        """Wait for queued work, then destroy the stream and free the pinned memory."""


class Layout:
    """The layout of several tensors in one block of device memory, each aligned to `ALIGNMENT`."""

    def __init__(self) -> None:
        self.size = 0
        self._places: dict[str, tuple[int, Any, tuple[int, ...]]] = {}

    def add(self, name: str, dtype: Any, shape: Sequence[int], itemsize: int) -> None:
        """Append a tensor.

        Args:
            name: the tensor's name.
            dtype: element type as onnxruntime's bindings take it; not used here.
            shape: dimensions.
            itemsize: bytes per element.
        """
        self._places[name] = (self.size, dtype, tuple(shape))
        size = int(np.prod(shape, dtype=np.int64)) * itemsize
        self.size += -(-size // ALIGNMENT) * ALIGNMENT

    def offset(self, name: str) -> int:
        """Offset of a tensor in the block, in bytes."""
        return self._places[name][0]

    def tensors(self, base: int) -> dict[str, tuple[int, Any, tuple[int, ...]]]:
        """Address, element type and shape of each tensor, for a block at address `base`."""
        return {n: (base + at, dtype, shape) for n, (at, dtype, shape) in self._places.items()}
