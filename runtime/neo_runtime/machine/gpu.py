"""Check whether a GPU can be used; errors say why not and what to do."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import DependencyError, DeviceError
from neo_runtime.machine.installation import require_onnxruntime, version_numbers

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "CUDA_PROVIDER",
    "GpuFacts",
    "cuda_driver",
    "cuda_runtime",
    "require_cuda_provider",
    "require_gpu",
]

CUDA_PROVIDER = "CUDAExecutionProvider"
_NO_DRIVER = (
    "there is no NVIDIA driver on this machine, or its library is not in the library search path "
    "(a container may not pass it through); install the driver, or start the container with "
    "--gpus all"
)
_PRELOADING = threading.Lock()
_preloaded: list[ModuleType] = []
_DRIVER_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True)
class GpuFacts:
    """The properties of a GPU that the driver reports."""

    index: int
    name: str
    compute_capability: str
    """Such as "9.0"."""
    memory_bytes: int
    """Total memory."""
    driver_cuda: tuple[int, int]
    """The newest CUDA version that the driver supports: major, minor."""


def cuda_runtime() -> ModuleType:
    """The module `cuda.bindings.runtime`.

    Raises:
        DependencyError: cuda-bindings is missing, or cannot be loaded.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DependencyError(
            f"cuda-bindings is missing or cannot be loaded ({error}); it comes with "
            f"pip install 'neo-onnx[gpu]' (or 'neo-onnx[tensorrt]'){_beside_the_wheel_for_cpus()}"
        ) from error


def cuda_driver() -> ModuleType:
    """The module `cuda.bindings.driver`; raises as `cuda_runtime`."""
    cuda_runtime()
    return importlib.import_module("cuda.bindings.driver")


def _beside_the_wheel_for_cpus() -> str:
    try:
        importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return "; for [gpu], pip uninstall onnxruntime first: the two wheels overwrite each other"


def _has_driver() -> bool:
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def require_gpu(index: int = 0) -> GpuFacts:
    """The properties of the GPU with this CUDA device index.

    Raises:
        DependencyError: cuda-bindings is missing.
        DeviceError: there is no driver, it is too old, there is no GPU, or none with this index.
    """
    try:
        cuda: Any = cuda_runtime()
    except DependencyError:
        if not _has_driver():  # then installing packages would not help
            raise DeviceError(_NO_DRIVER) from None
        raise
    driver = _version(cuda.cudaDriverGetVersion())
    if driver == (0, 0):
        raise DeviceError(_NO_DRIVER)
    code, count = cuda.cudaGetDeviceCount()
    name = getattr(code, "name", str(code))
    if name == "cudaErrorInsufficientDriver":
        needed = _version(cuda.cudaRuntimeGetVersion())
        raise DeviceError(
            f"the NVIDIA driver supports CUDA up to {_text(driver)}, but cuda-bindings needs "
            f"{_text(needed)}; update the driver"
        )
    if int(code) != 0 or not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
        reason = "" if name in ("cudaSuccess", "cudaErrorNoDevice") else f": {name}"
        raise DeviceError(f"the driver shows no usable NVIDIA GPU{hint}{reason}; check nvidia-smi")
    if not 0 <= index < count:
        raise DeviceError(
            f"device is {index}, but this machine has {count} GPUs, expected 0 to {count - 1}; "
            "choose one of them"
        )
    code, properties = cuda.cudaGetDeviceProperties(index)
    if int(code) != 0:
        raise DeviceError(
            f"the properties of device {index} cannot be read ({getattr(code, 'name', code)}); "
            "check nvidia-smi"
        )
    name = properties.name
    return GpuFacts(
        index=index,
        name=name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        driver_cuda=driver,
    )


def require_cuda_provider(gpu: GpuFacts) -> ModuleType:
    """The module `onnxruntime`, checked to have a CUDA provider that the driver supports.

    Raises:
        DependencyError: onnxruntime-gpu is not installed, or another wheel is installed too.
        DeviceError: the driver is too old for its CUDA version.
    """
    ort = require_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise DependencyError(
            f"the installed onnxruntime ({ort.__version__}) is built without CUDA; replace it: "
            "pip uninstall onnxruntime, then pip install 'neo-onnx[gpu]'"
        )
    built = str(getattr(ort, "cuda_version", "") or "")
    if built and version_numbers(built)[0] > gpu.driver_cuda[0]:
        raise DeviceError(
            f"onnxruntime {ort.__version__} is built for CUDA {built}, but the driver supports "
            f"CUDA up to {_text(gpu.driver_cuda)}; update the driver"
        )
    _preload(ort)
    return ort


def _preload(ort: ModuleType) -> None:
    """Load CUDA's libraries from site-packages, once per process, without onnxruntime's output.

    onnxruntime prints which libraries it cannot find. Redirecting the output affects the whole
    process, so only one thread may do it at a time.
    """
    import contextlib
    import io

    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    with _PRELOADING:
        if ort in _preloaded:
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            preload()
        _preloaded.append(ort)


def _version(result: tuple[Any, int]) -> tuple[int, int]:
    """Major and minor of a CUDA version number (13050 is 13.5); (0, 0) if the call failed."""
    code, number = result
    return (number // 1000, number % 1000 // 10) if int(code) == 0 else (0, 0)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
