"""A `Device` for NVIDIA GPUs, by the CUDA runtime and driver APIs (`cuda-bindings`)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.device.base import Device
from neo_runtime.errors import DeviceError, DeviceMemoryError, HostMemoryError
from neo_runtime.machine.gpu import cuda_driver, cuda_runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from neo_runtime.backends.device.base import KernelCall

__all__ = ["CudaDevice", "checked"]

_SHARED_WITHOUT_ASKING = 48 << 10
"""Bytes of dynamic shared memory that a kernel may use without opting in to more (CUDA C++
Programming Guide, compute capabilities)."""
_ARGUMENT_TYPES = {4: ctypes.c_int32, 8: ctypes.c_void_p}


def checked(results: tuple[Any, ...], what: str) -> Any:
    """Check a CUDA call, and return its results without the error code.

    Args:
        results: what the call returned: the error code, then its results.
        what: what the call does, to complete "failed to …".

    Returns:
        The result if there is exactly one, else a tuple.

    Raises:
        DeviceMemoryError: the device has too little free memory.
        DeviceError: any other failure.
    """
    code, *values = results
    if int(code) == 0:
        return values[0] if len(values) == 1 else tuple(values)
    name = getattr(code, "name", str(code))
    if name in ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"):
        raise DeviceMemoryError(
            f"the GPU's memory is full: CUDA failed to {what}; close other programs that use it, "
            "request fewer or shorter sequences at once (max_cache_bytes limits the KV cache), or "
            "export with --int4"
        )
    raise DeviceError(f"CUDA failed to {what}: {name}; check the driver with nvidia-smi and dmesg")


class CudaDevice(Device):
    """A CUDA device with its own stream. Each call first makes it the thread's current device."""

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Create a stream.

        Args:
            index: CUDA device index.

        Raises:
            DependencyError: cuda-bindings is not installed.
            DeviceError: the device cannot be used; `neo_runtime.machine.gpu.require_gpu` says why.
        """
        self.index = index
        self._cuda: Any = cuda_runtime()
        self.select()
        flags = self._cuda.cudaStreamNonBlocking
        self.stream: Any = checked(self._cuda.cudaStreamCreateWithFlags(flags), "make a stream")
        self._pinned: set[int] = set()

    def select(self) -> None:
        """See `Device.select`."""
        checked(self._cuda.cudaSetDevice(self.index), f"select device {self.index}")

    def allocate(self, size: int) -> int:
        """See `Device.allocate`."""
        self.select()
        return int(checked(self._cuda.cudaMalloc(max(size, 1)), f"allocate {size} bytes"))

    def free(self, address: int) -> None:
        """See `Device.free`."""
        self.select()
        checked(self._cuda.cudaFree(address), "free memory")

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Device.pinned`."""
        self.select()
        flags = self._cuda.cudaHostAllocDefault
        code, address = self._cuda.cudaHostAlloc(max(size, 1), flags)
        if getattr(code, "name", "") == "cudaErrorMemoryAllocation":
            raise HostMemoryError(
                f"the system cannot pin {size} bytes of host memory for copies to the GPU; close "
                "other programs, or raise the container's memory limit"
            )
        address = int(checked((code, address), f"pin {size} bytes of host memory"))
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def unpin(self, array: NDArray[Any]) -> None:
        """See `Device.unpin`."""
        self.select()
        self._pinned.remove(array.ctypes.data)
        checked(self._cuda.cudaFreeHost(array.ctypes.data), "free host memory")

    def zero(self, address: int, size: int) -> None:
        """See `Device.zero`."""
        self.select()
        checked(self._cuda.cudaMemsetAsync(address, 0, size, self.stream), "clear memory")

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """See `Device.upload`."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: NDArray[Any], address: int) -> None:
        """See `Device.download`."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        self.select()
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        result = self._cuda.cudaMemcpyAsync(to, source, size, direction, self.stream)
        checked(result, "copy memory")

    def copy_rows(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int
    ) -> None:
        """See `Device.copy_rows`."""
        self.select()
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        result = self._cuda.cudaMemcpy2DAsync(
            to, to_pitch, source, pitch, width, rows, kind, self.stream
        )
        checked(result, "copy memory")

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self.select()
        checked(self._cuda.cudaStreamSynchronize(self.stream), "compute")

    def providers(self, *, capture: bool) -> list[Any]:
        """See `Device.providers`."""
        options = {
            "device_id": str(self.index),
            "user_compute_stream": str(int(self.stream)),
            "enable_cuda_graph": "1" if capture else "0",
            # By default the arena doubles with each extension, and never shrinks.
            "arena_extend_strategy": "kSameAsRequested",
            # Flash, memory-efficient or unfused attention. The default for prompts on Hopper is
            # cuDNN's, which makes and keeps a plan for each length, batch size and thread.
            "sdpa_kernel": str(1 | 2 | 16),
        }
        return [("CUDAExecutionProvider", options)]

    @property
    def stream_handle(self) -> int:
        """See `Device.stream_handle`."""
        return int(self.stream)

    def capture(self, queue: Callable[[], None]) -> Any:
        """See `Device.capture`."""
        self.select()
        # Thread-local: other threads may allocate meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            # Inside `try`, because Ctrl-C may arrive right after the capture has begun.
            checked(self._cuda.cudaStreamBeginCapture(self.stream, mode), "begin a capture")
            queue()
        except BaseException:  # end the capture, but raise the original error
            code, begun = self._cuda.cudaStreamEndCapture(self.stream)
            if int(code) == 0:
                self._cuda.cudaGraphDestroy(begun)
            raise
        graph = checked(self._cuda.cudaStreamEndCapture(self.stream), "end a capture")
        try:
            return checked(self._cuda.cudaGraphInstantiate(graph, 0), "instantiate a graph")
        finally:
            checked(self._cuda.cudaGraphDestroy(graph), "destroy a graph")

    def replay(self, graph: Any) -> None:
        """See `Device.replay`."""
        self.select()
        checked(self._cuda.cudaGraphLaunch(graph, self.stream), "launch a graph")

    def discard(self, graph: Any) -> None:
        """See `Device.discard`."""
        self.select()
        checked(self._cuda.cudaGraphExecDestroy(graph), "destroy a graph")

    def load_kernel(self, image: bytes, name: str, shared_bytes: int) -> Any:
        """See `Device.load_kernel`. Returns the CUDA module and the function in it."""
        self.select()
        driver = cuda_driver()
        module = checked(driver.cuModuleLoadData(image), f"load the kernel {name}")
        try:
            function = checked(
                driver.cuModuleGetFunction(module, name.encode()), f"find the kernel {name}"
            )
            # Load it now: lazy loading would happen on its first launch, during a capture.
            checked(driver.cuFuncLoad(function), f"load the kernel {name}")
            if shared_bytes > _SHARED_WITHOUT_ASKING:
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                result = driver.cuFuncSetAttribute(function, most, shared_bytes)
                checked(result, f"give {shared_bytes} bytes of shared memory to {name}")
        except BaseException:
            driver.cuModuleUnload(module)
            raise
        return module, function

    def unload_kernel(self, kernel: Any) -> None:
        """See `Device.unload_kernel`."""
        self.select()
        checked(cuda_driver().cuModuleUnload(kernel[0]), "unload a kernel")

    def launch(self, kernel: Any, call: KernelCall) -> None:
        """See `Device.launch`."""
        self.select()
        driver = cuda_driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = call.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = call.threads, 1, 1
        config.sharedMemBytes = call.shared_bytes
        config.hStream = driver.CUstream(int(self.stream))
        if call.overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        numbers = tuple(number for number, _ in call.arguments)
        types = tuple(_ARGUMENT_TYPES[size] for _, size in call.arguments)
        checked(driver.cuLaunchKernelEx(config, kernel[1], (numbers, types), 0), "launch a kernel")

    def close(self) -> None:
        """See `Device.close`."""
        self.select()
        self.synchronize()
        for address in self._pinned:
            checked(self._cuda.cudaFreeHost(address), "free host memory")
        self._pinned.clear()
        checked(self._cuda.cudaStreamDestroy(self.stream), "destroy a stream")
