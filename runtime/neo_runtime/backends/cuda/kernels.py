"""A bundle's own kernels for decode steps, in place of onnxruntime's graph.

They read the weights where onnxruntime reads them, and the buffers of a slot. One step is captured
as a CUDA graph by the device itself, so that neither onnxruntime's threads nor its limit on graphs
matter.
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
    """The kernels of a bundle for a GPU, or None where it has none for its kind.

    Args:
        bundle: an opened bundle.
        compute_capability: of the GPU, such as "9.0".

    Raises:
        EngineError: they are damaged, or were built from another bundle.
    """
    path = kernels_path(bundle.path, compute_capability)
    if not path.exists():
        return None
    kernels = read_kernels(path)
    digest = bundle.manifest.digest
    if (kernels.bundle_digest, kernels.compute_capability) != (digest, compute_capability):
        raise EngineError(
            f"{path} does not fit: it was built from a bundle with digest "
            f"{kernels.bundle_digest[:12]}… for compute capability {kernels.compute_capability}; "
            f"this bundle has {digest[:12]}…, this GPU {compute_capability}; build the kernels "
            "again with neo-kernels, or delete the file"
        )
    return kernels


class LoadedKernels:
    """Kernels on a device, with their memory. Callers hold the device's lock."""

    def __init__(
        self,
        kernels: StepKernels,
        device: Device,
        allocate: Callable[[int], int],
    ) -> None:
        """Load them.

        Args:
            kernels: which fit the bundle and the device.
            device: where they run.
            allocate: gives device memory.

        Raises:
            DeviceMemoryError: the device has no room.
            EngineError: a kernel is damaged, or the device does not load it.
        """
        self._kernels, self._device = kernels, device
        self._loaded: list[object] = []
        self._memory = allocate(kernels.memory_bytes)
        with closed_on_error(self):
            device.zero(self._memory, kernels.memory_bytes)
            for kernel in kernels.kernels:
                self._loaded.append(_load(device, kernel))

    def takes(self, rows: int) -> bool:
        """Whether there is a step for a batch."""
        return self._kernels.step_for(rows) is not None

    def decode(self, slot: Slot, weights: int) -> None:
        """Queue one step over the buffers of a slot, captured the first time.

        Args:
            slot: of a batch that they take.
            weights: address of the bundle's `weights.bin`, always the same.
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
        """Give them and their memory back; captured steps must be gone."""
        self._device.synchronize()  # an interrupted step may still run
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
            f"the bundle's own kernels for decode steps cannot be loaded ({error}); update the "
            "driver, build them again with neo-kernels, or delete their file in engines/"
        ) from error


def _number(
    argument: Argument, slot: Slot, bases: dict[str, int], addresses: dict[str, int]
) -> int:
    if argument.kind in bases:
        return bases[argument.kind] + argument.offset
    if argument.kind == "tensor":
        if argument.name not in addresses:
            raise EngineError(
                f"the kernels read {argument.name}, which a decode step of this bundle has not; "
                "build them again with neo-kernels"
            )
        return addresses[argument.name]
    return {"rows": slot.batch, "length": slot.length, "none": 0}[argument.kind]


def _sized(numbers: Sequence[int], types: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Numbers with their bytes."""
    pairs = zip(numbers, types, strict=True)
    return tuple((number, 8 if kind.startswith("*") else 4) for number, kind in pairs)
