"""The GPU a plan is built for: this machine's, found through the driver, or a named capability."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.errors import EngineError, RequestError

if TYPE_CHECKING:
    from neo_export.engine.flavour import Flavour

__all__ = ["Device", "device_for", "local_device"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")


@dataclass(frozen=True)
class Device:
    """A kind of GPU."""

    compute_capability: str
    """For example "8.9"."""
    name: str | None
    """As the driver reports it; None if only the compute capability is known."""

    @property
    def member(self) -> str:
        """Its member of TensorRT's `ComputeCapability`, such as "SM89"."""
        return f"SM{self.compute_capability.replace('.', '')}"


def local_device(index: int = 0) -> Device | None:
    """GPU number `index` of this machine, from the CUDA driver; None if there is none."""
    driver = _driver()
    count, handle = ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    if index >= count.value or driver.cuDeviceGet(ctypes.byref(handle), index):
        return None
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuDeviceGetName(name, len(name), handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle)
    )
    return None if failed else Device(f"{major.value}.{minor.value}", name.value.decode())


def _driver() -> ctypes.CDLL | None:
    for library in _LIBRARIES:
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None


def device_for(flavour: Flavour, asked: str | None) -> Device:
    """The GPU to build for.

    Args:
        flavour: the installed TensorRT.
        asked: a compute capability such as "8.9", or None for this machine's GPU.

    Raises:
        RequestError: `asked` is malformed, or TensorRT for RTX cannot build for it.
        EngineError: a GPU is needed and this machine has none, it has another compute capability
            than `asked`, or TensorRT for RTX does not run on it.
    """
    here = local_device()
    if asked is None:
        if here is not None:
            _require_support(flavour, here)
            return here
        remedy = (
            "name the compute capability to build for, such as --compute-capability 8.9"
            if flavour.ahead_of_time
            else "run neo-engine on the machine with the GPU, or install TensorRT for RTX, which "
            "builds without one"
        )
        raise EngineError(f"no NVIDIA GPU or driver was found on this machine; {remedy}")
    if not re.fullmatch(r"\d+\.\d", asked):
        raise RequestError(
            f"--compute-capability is {asked!r}, expected MAJOR.MINOR, such as 8.9 (Ada) or 12.0"
        )
    if not flavour.ahead_of_time:
        if here is not None and here.compute_capability == asked:
            return here
        found = f"this GPU has {here.compute_capability}" if here else "this machine has no GPU"
        raise EngineError(
            f"TensorRT builds on the GPU that runs the plan: --compute-capability is {asked}, but "
            f"{found}; build on a machine with such a GPU, or with TensorRT for RTX"
        )
    device = Device(asked, None)
    if device.member not in _known(flavour):
        raise RequestError(
            f"{flavour.product} {flavour.version} cannot build for compute capability {asked}, "
            f"expected one of {_names(flavour)}"
        )
    return device


def _require_support(flavour: Flavour, here: Device) -> None:
    """Refuse a GPU such as the H100, for which TensorRT for RTX builds plans but runs none."""
    if flavour.ahead_of_time and here.member not in _known(flavour):
        raise EngineError(
            f"{flavour.product} {flavour.version} does not run on {here.name}, compute capability "
            f"{here.compute_capability}, expected one of {_names(flavour)}; for this GPU install "
            "the full TensorRT: pip install 'neo-onnx[tensorrt]'"
        )


def _known(flavour: Flavour) -> list[str]:
    """Members of TensorRT's `ComputeCapability` that name a GPU generation."""
    return [name for name in flavour.module.ComputeCapability.__members__ if name[:2] == "SM"]


def _names(flavour: Flavour) -> str:
    return ", ".join(f"{name[2:-1]}.{name[-1]}" for name in _known(flavour))
