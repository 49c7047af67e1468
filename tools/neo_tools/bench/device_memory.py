"""GPU memory that one process holds, as counted by the driver; this includes CUDA's context.

Comparing free memory before and after would also count what other processes allocate in between.
NVML's structures and versions are those of its header, nvml.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ProcessMemory", "bus_id"]

_LIBRARY = "libnvidia-ml.so.1"
_MOST_PROCESSES = 256
_NOT_AVAILABLE = (1 << 64) - 1
"""NVML_VALUE_NOT_AVAILABLE: the answer of a driver that does not count memory per process."""


class _ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def bus_id(device: int) -> str:
    """PCI bus id of a GPU, as in the driver's tools; CUDA may number GPUs in another order.

    Creates CUDA's context for the device, if there is none.

    Raises:
        DeviceError: there is no such device.
    """
    from neo_runtime.backends.device.nvidia import checked
    from neo_runtime.machine.gpu import cuda_runtime

    cuda: Any = cuda_runtime()
    checked(cuda.cudaSetDevice(device), f"select device {device}")
    checked(cuda.cudaFree(0), "make a context")
    name: bytes = checked(cuda.cudaDeviceGetPCIBusId(32, device), "find the GPU's place")
    return name.split(b"\0")[0].decode()


class ProcessMemory:
    """The memory that this process holds on one GPU."""

    def __init__(self, device: int) -> None:
        """Create CUDA's context for the device; this process must not have one yet.

        In a container, the driver may know this process by another id. It is then found as the
        process that appears with the context, so no other one may start to use a GPU meanwhile.

        Raises:
            DeviceError: there is no such device.
        """
        before = _used_bytes(None)
        self._bus_id = bus_id(device)
        now = _used_bytes(self._bus_id)
        new = now.keys() - before.keys()
        self._pid = os.getpid()
        if self._pid not in now and len(new) == 1:
            [self._pid] = new

    def bytes(self) -> int | None:
        """Bytes held now; None if the driver does not tell."""
        return _used_bytes(self._bus_id).get(self._pid)


def _used_bytes(bus_id: str | None) -> dict[int, int | None]:
    """Process id → bytes on one GPU (such as "0000:00:06.0"), or on any; {} without a driver.

    The bytes are None for a process that the driver does not count.
    """
    try:
        nvml: Any = ctypes.CDLL(_LIBRARY)
    except OSError:
        return {}
    if nvml.nvmlInit_v2():
        return {}
    found: dict[int, int | None] = {}
    try:
        for device in _devices(nvml, bus_id):
            count = ctypes.c_uint(_MOST_PROCESSES)
            processes = (_ProcessInfo * _MOST_PROCESSES)()
            if nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes):
                continue
            for process in processes[: count.value]:
                used = int(process.used)
                found[int(process.pid)] = None if used == _NOT_AVAILABLE else used
    except AttributeError:  # an old driver without these functions
        return {}
    finally:
        nvml.nvmlShutdown()
    return found


def _devices(nvml: Any, bus_id: str | None) -> Iterator[ctypes.c_void_p]:
    device = ctypes.c_void_p()
    if bus_id is not None:
        if not nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(device)):
            yield device
        return
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return
    for index in range(count.value):
        if not nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            yield device
