"""Memory of a GPU that one process holds, as the driver counts it: CUDA's context is part of it.

Free memory before and after would count what other processes take in between. NVML's structures and
versions are those of its header, nvml.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

__all__ = ["bus_id", "process_device_bytes"]

_LIBRARY = "libnvidia-ml.so.1"
_MOST_PROCESSES = 256
_NOT_AVAILABLE = (1 << 64) - 1
"""NVML_VALUE_NOT_AVAILABLE: what a driver answers that does not count."""


class _ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def bus_id(device: int) -> str:
    """Where a GPU sits, as the driver's tools name it; CUDA may count GPUs in another order.

    Makes CUDA's context of the device, if there is none.

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


def process_device_bytes(bus_id: str, pid: int | None = None) -> int | None:
    """Bytes that a process holds on a GPU; None where the driver does not say.

    It does not where process numbers differ between a container and the driver.

    Args:
        bus_id: of the GPU, as CUDA names it: "0000:00:06.0".
        pid: the process; None for this one.
    """
    try:
        nvml: Any = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    device, count = ctypes.c_void_p(), ctypes.c_uint(_MOST_PROCESSES)
    found = (_ProcessInfo * _MOST_PROCESSES)()
    if nvml.nvmlInit_v2():
        return None
    try:
        failed = nvml.nvmlDeviceGetHandleByPciBusId_v2(
            bus_id.encode(), ctypes.byref(device)
        ) or nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), found)
    except AttributeError:  # a driver older than these functions
        return None
    finally:
        nvml.nvmlShutdown()
    if failed:
        return None
    wanted = os.getpid() if pid is None else pid
    used = [int(process.used) for process in found[: count.value] if process.pid == wanted]
    return used[0] if used and used[0] != _NOT_AVAILABLE else None
