"""Load and launch a bundle's decode kernels, which replace onnxruntime's decode graph.

They use the same copy of the weights and the same slots as onnxruntime. A step is captured as a
CUDA graph by `Device.capture`, so onnxruntime's restrictions on threads and graphs do not apply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.backends.device.base import KernelCall
from neo_runtime.bundle.step_kernels import kernels_path, read_kernels
from neo_runtime.closable import closed_on_error
from neo_runtime.errors import DeviceError, DeviceMemoryError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime.backends.cuda.slots import Slot
    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.step_kernels import Argument, Kernel, Launch, StepKernels

__all__ = ["LoadedKernels", "fitting_kernels"]


def fitting_kernels(bundle: Bundle, compute_capability: str) -> StepKernels | None:
    """A bundle's decode kernels for a GPU; None if it has none for that compute capability.

    Args:
        bundle: an opened bundle.
        compute_capability: the GPU's, such as "9.0".

    Raises:
        EngineError: the file is damaged, or was built from another bundle.
        BundleUnsupportedError: the file has another schema version.
    """
    path = kernels_path(bundle.path, compute_capability)
    if not path.exists():
        return None
    kernels = read_kernels(path)
    digest = bundle.manifest.digest
    if (kernels.bundle_digest, kernels.compute_capability) != (digest, compute_capability):
        raise EngineError(
            f"{path} does not fit: it was built from a bundle with digest "
            f"{kernels.bundle_digest[:12]}… for compute capability {kernels.compute_capability}, "
            f"but this bundle has digest {digest[:12]}… and this GPU {compute_capability}; build "
            "the kernels again with neo-kernels, or delete the file"
        )
    return kernels


class LoadedKernels:
    """Decode kernels on a device, with their scratch memory. Callers hold the device's lock."""

    def __init__(
        self,
        kernels: StepKernels,
        device: Device,
        allocate: Callable[[int], int],
    ) -> None:
        """Load the kernels, and allocate their memory.

        Args:
            kernels: kernels that fit the bundle and the device.
            device: the device to run on.
            allocate: allocates bytes of device memory, and returns the address.

        Raises:
            DeviceMemoryError: the device has too little free memory.
            EngineError: a kernel is damaged, or cannot be loaded.
        """
        self._kernels, self._device = kernels, device
        self._loaded: list[object] = []
        self._memory = allocate(kernels.memory_bytes)
        with closed_on_error(self):
            device.zero(self._memory, kernels.memory_bytes)
            for kernel in kernels.kernels:
                self._loaded.append(_load(device, kernel))

    def takes(self, rows: int) -> bool:
        """Whether the kernels support batches of `rows` sequences."""
        return self._kernels.step_for(rows) is not None

    def decode(self, slot: Slot, weights: int) -> None:
        """Queue one step on a slot's buffers; its first step is captured.

        Args:
            slot: a slot whose batch size `takes` accepts.
            weights: device address of the copy of `weights.bin`; the same in all calls.
        """
        if slot.step is None:
            slot.step = self._device.capture(lambda: self._queue(slot, weights))
        self._device.replay(slot.step)

    def _queue(self, slot: Slot, weights: int) -> None:
        step = self._kernels.step_for(slot.batch)
        assert step is not None
        bases = {"weights": weights, "memory": self._memory}
        addresses = {
            name: address
            for tensors in (slot.inputs, slot.cache, slot.logits, slot.small)
            for name, (address, _, _) in tensors.items()
        }
        for launch in step.launches:
            self._launch(launch, slot, bases, addresses)

    def _launch(
        self, launch: Launch, slot: Slot, bases: dict[str, int], addresses: dict[str, int]
    ) -> None:
        kernel = self._kernels.kernels[launch.kernel]
        numbers = [_number(argument, slot, bases, addresses) for argument in launch.arguments]
        grid = [extent.of(slot.batch, slot.length) for extent in launch.grid]
        call = KernelCall(
            grid=(grid[0], grid[1], grid[2]),
            threads=kernel.threads,
            shared_bytes=kernel.shared_bytes,
            arguments=_sized(numbers, kernel.types),
            overlap=self._kernels.overlap,
        )
        self._device.launch(self._loaded[launch.kernel], call)

    def close(self) -> None:
        """Unload the kernels and free their memory. Captured steps must have been discarded."""
        self._device.synchronize()  # an interrupted step may still be running
        while self._loaded:
            self._device.unload_kernel(self._loaded.pop())
        if self._memory:
            self._device.free(self._memory)
            self._memory = 0


def _load(device: Device, kernel: Kernel) -> object:
    image = kernel.binary()
    try:
        return device.load_kernel(image, kernel.name, kernel.shared_bytes)
    except DeviceMemoryError:
        raise
    except DeviceError as error:
        raise EngineError(
            f"the bundle's decode kernels cannot be loaded ({error}); update the driver, build "
            "them again with neo-kernels, or delete their file in engines/"
        ) from error


def _number(
    argument: Argument, slot: Slot, bases: dict[str, int], addresses: dict[str, int]
) -> int:
    if argument.kind in bases:
        return bases[argument.kind] + argument.offset
    if argument.kind == "tensor":
        if argument.name not in addresses:
            raise EngineError(
                f"the decode kernels read a tensor {argument.name}, which the decode graph of this "
                "bundle does not have; build them again with neo-kernels"
            )
        return addresses[argument.name]
    return {"rows": slot.batch, "length": slot.length, "none": 0}[argument.kind]


def _sized(numbers: Sequence[int], types: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Arguments with their sizes in bytes: 8 for pointers, else 4."""
    pairs = zip(numbers, types, strict=True)
    return tuple((number, 8 if kind.startswith("*") else 4) for number, kind in pairs)
