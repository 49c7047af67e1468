"""A `Device` over host memory that checks the interface's contract at every call."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.backends.device.base import ALIGNMENT, Device
from neo_runtime.errors import DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.backends.device.base import KernelCall
    from numpy.typing import NDArray


class HostDevice(Device):
    """A device of `capacity` bytes (None: unlimited); new memory is filled with NaN bytes."""

    name, index = "cpu", 0

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self._all: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self.downloaded = self.uploaded = 0
        self.peak = 0
        self.captures = self.replays = self.discards = 0
        self.captured: list[bool] = []
        self.closed = False

    @property
    def in_use(self) -> int:
        return sum(len(block) for block in self.blocks.values())

    @property
    def pinned_blocks(self) -> int:
        return len(self._pinned)

    def allocate(self, size: int) -> int:
        assert not self.closed
        if self.capacity is not None and self.in_use + size > self.capacity:
            raise DeviceMemoryError("the GPU has no memory left for the test")
        whole = np.full(size + ALIGNMENT, 0xFF, dtype=np.uint8)
        offset = -whole.ctypes.data % ALIGNMENT
        block = whole[offset : offset + size]
        self.blocks[block.ctypes.data] = block
        self._all[block.ctypes.data] = whole
        self.peak = max(self.peak, self.in_use)
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self.blocks[address]
        del self._all[address]

    def _view(self, address: int, size: int) -> NDArray[np.uint8]:
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} were not allocated")

    def pinned(self, size: int) -> NDArray[np.uint8]:
        array = np.full(size, 0xFF, dtype=np.uint8)
        self._pinned[array.ctypes.data] = array
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        del self._pinned[array.ctypes.data]

    def zero(self, address: int, size: int) -> None:
        self._view(address, size)[:] = 0

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        self.uploaded += array.nbytes
        self._view(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, array: NDArray[Any], address: int) -> None:
        assert array.flags.c_contiguous
        self.downloaded += array.nbytes
        source = self._view(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, source.ctypes.data, array.nbytes)

    def copy_rows(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int
    ) -> None:
        assert 0 < width <= min(to_pitch, pitch), "CUDA does not say what no bytes mean"
        for row in range(rows):
            found = self._view(source + row * pitch, width).copy()
            self._view(to + row * to_pitch, width)[:] = found

    def synchronize(self) -> None:
        assert not self.closed

    def providers(self, *, capture: bool) -> list[Any]:
        self.captured.append(capture)
        return ["CPUExecutionProvider"]

    @property
    def stream_handle(self) -> int:
        return 0

    def capture(self, queue: Callable[[], None]) -> Any:
        self.captures += 1
        return queue

    def replay(self, graph: Any) -> None:
        self.replays += 1
        graph()

    def discard(self, graph: Any) -> None:
        self.discards += 1

    def load_kernel(self, image: bytes, name: str, shared_bytes: int) -> Any:
        raise AssertionError("host memory runs no machine code")

    def unload_kernel(self, kernel: Any) -> None:
        raise AssertionError("no kernel was loaded")

    def launch(self, kernel: Any, call: KernelCall) -> None:
        raise AssertionError("no kernel was loaded")

    def close(self) -> None:
        assert not self.blocks, "memory was not given back"
        assert not self._pinned, "pinned memory was not given back"
        self.closed = True
