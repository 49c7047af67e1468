"""Whether a GPU can be used here, and if not, why and what to do."""

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
    "there is no NVIDIA driver on this machine, or its library is not where the system looks for "
    "libraries (in a container: it is not passed in); install it, or start the container with "
    "--gpus all"
)
_PRELOADING = threading.Lock()
_preloaded: list[ModuleType] = []
_DRIVER_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as the driver describes it."""

    index: int
    name: str
    compute_capability: str
    """Such as "9.0"."""
    memory_bytes: int
    driver_cuda: tuple[int, int]
    """The newest CUDA that the driver runs: major, minor."""


def cuda_runtime() -> ModuleType:
    """The module `cuda.bindings.runtime`.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DependencyError(
            f"cuda-bindings is missing or cannot be loaded ({error}); it comes with "
            f"pip install 'neo-onnx[gpu]' (or 'neo-onnx[tensorrt]'){_beside_the_wheel_for_cpus()}"
        ) from error


def cuda_driver() -> ModuleType:
    """The module `cuda.bindings.driver`, of the same package as `cuda_runtime`."""
    cuda_runtime()
    return importlib.import_module("cuda.bindings.driver")


def _beside_the_wheel_for_cpus() -> str:
    try:
        importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return "; for [gpu] pip uninstall onnxruntime first, the two wheels overwrite each other"


def _has_driver() -> bool:
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def require_gpu(index: int = 0) -> GpuFacts:
    """The GPU of this index.

    Raises:
        DependencyError: cuda-bindings is missing.
        DeviceError: no driver, too old a driver, no GPU, or none of this index; with the remedy.
    """
    try:
        cuda: Any = cuda_runtime()
    except DependencyError:
        if not _has_driver():  # then packages would help nobody
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
            f"the NVIDIA driver runs CUDA up to {_text(driver)}, and cuda-bindings wants "
            f"{_text(needed)}; update the driver"
        )
    if int(code) != 0 or not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
        reason = "" if name in ("cudaSuccess", "cudaErrorNoDevice") else f": {name}"
        raise DeviceError(f"the driver shows no usable NVIDIA GPU{hint}{reason}; check nvidia-smi")
    if not 0 <= index < count:
        raise DeviceError(
            f"device {index} was asked for, but there are {count} (0 to {count - 1}); choose one "
            "of them"
        )
    code, properties = cuda.cudaGetDeviceProperties(index)
    if int(code) != 0:
        raise DeviceError(f"device {index} cannot be read: {getattr(code, 'name', code)}")
    name = properties.name
    return GpuFacts(
        index=index,
        name=name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        driver_cuda=driver,
    )


def require_cuda_provider(gpu: GpuFacts) -> ModuleType:
    """An onnxruntime that has the CUDA provider, for a driver that runs its CUDA.

    Raises:
        DependencyError: the wheel for CPUs, both wheels, or none is installed.
        DeviceError: the driver is too old for the wheel.
    """
    ort = require_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise DependencyError(
            f"this onnxruntime ({ort.__version__}) is built without CUDA; replace it: "
            "pip uninstall onnxruntime, then pip install 'neo-onnx[gpu]'"
        )
    built = str(getattr(ort, "cuda_version", "") or "")
    if built and version_numbers(built)[0] > gpu.driver_cuda[0]:
        raise DeviceError(
            f"onnxruntime {ort.__version__} is built for CUDA {built}, the driver runs CUDA up to "
            f"{_text(gpu.driver_cuda)}; update the driver"
        )
    _preload(ort)
    return ort


def _preload(ort: ModuleType) -> None:
    """Let onnxruntime find CUDA's libraries in site-packages; once, as it prints what it lacks.

    Printing is kept back for the whole process, so no two threads may do it at a time.
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
    """CUDA's way to write versions: 13050 is 13.5."""
    code, number = result
    return (number // 1000, number % 1000 // 10) if int(code) == 0 else (0, 0)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
