"""One copy of `weights.bin` in device memory, shared by all graphs of a bundle.

onnxruntime accepts external initializers (`SessionOptions.add_initializer`), and uses them in place
if they are on the device that it planned for them. They must be `OrtValue`s over memory that it
does not own, and its Python API can create such values in one way only: by binding an output to an
address. So each tensor is bound as the output of a graph that is never run (`_IDENTITY`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.manifest import WEIGHTS_NAME
from neo_runtime.bundle.onnx_external import external_tensors
from neo_runtime.errors import BundleDamagedError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.folder import Bundle

__all__ = ["DeviceWeights"]

_CHUNK = 1 << 26
_IDENTITY = (
    b"\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y\x22\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08"
    b"\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04"
    b"\n\x00\x10\x11"
)
"""A serialized ONNX model: y = Identity(x), float32 [1], opset 17."""


class DeviceWeights:
    """The device's copy of a bundle's `weights.bin`."""

    def __init__(self, bundle: Bundle, device: Device, ort: Any) -> None:
        """Copy the file to the device.

        Raises:
            DeviceMemoryError: the weights do not fit into device memory.
            HostMemoryError: the host has too little memory to pin for the copy.
            BundleDamagedError: the file has changed since the bundle was opened.
        """
        path = bundle.file(WEIGHTS_NAME)
        self._bundle, self._device = bundle, device
        self.nbytes = path.stat().st_size
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self._identity = ort.InferenceSession(
            _IDENTITY, options, providers=["CPUExecutionProvider"]
        )
        self._address = device.allocate(self.nbytes)
        try:
            _upload(path, device, self._address)
        except BaseException:
            device.free(self._address)
            raise

    @property
    def address(self) -> int:
        """Address of the device's copy of the file."""
        return self._address

    def initializers(self, graph: str) -> dict[str, Any]:
        """By name, an `OrtValue` over device memory for each external initializer of a graph.

        Raises:
            BundleDamagedError: a tensor extends beyond the end of the file.
        """
        file = self._bundle.graph(graph)
        values = {}
        for tensor in external_tensors(file.read_bytes()):
            if tensor.offset + tensor.length > self.nbytes:
                raise BundleDamagedError(
                    f"{file} reads {tensor.name} beyond the end of {WEIGHTS_NAME}, which has "
                    f"{self.nbytes} bytes; export the bundle again"
                )
            values[tensor.name] = self._value(
                tensor.element_type, tensor.shape, self._address + tensor.offset
            )
        return values

    def _value(self, element_type: int, shape: tuple[int, ...], address: int) -> Any:
        binding = self._identity.io_binding()
        device = self._device
        binding.bind_output("y", device.name, device.index, element_type, shape, address)
        return binding.get_outputs()[0]

    def close(self) -> None:
        """Free the memory. All sessions that use it must have been released."""
        if self._address:
            self._device.free(self._address)
            self._address = 0


def _upload(path: Path, device: Device, address: int) -> None:
    """Copy a file to the device through two pinned buffers, reading one while copying the other."""
    buffers = [device.pinned(_CHUNK) for _ in range(2)]
    done, turn = 0, 0
    try:
        with path.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffers[turn].data):
                device.synchronize()  # wait for the other buffer's copy
                device.upload(address + done, buffers[turn][:size])
                done, turn = done + size, 1 - turn
        device.synchronize()
    finally:
        for buffer in buffers:
            device.unpin(buffer)
    if done != path.stat().st_size:
        raise BundleDamagedError(
            f"{path} changed while it was read ({done} bytes were read); call neo_runtime.load "
            "again"
        )
