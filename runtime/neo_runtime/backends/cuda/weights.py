"""The weight file in device memory, once: copied as it lies, and read by the graphs of a bundle.

onnxruntime takes initializers from outside (`SessionOptions.add_initializer`), and uses them where
they are if that is the device that it planned them for. It wants memory that it does not own, of
which its Python interface makes a value in one place only: where an output is bound to an address.
So each tensor is bound once as the output of a graph that is never run (`_IDENTITY`).
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
    """See the module. The sessions that use it must be gone before `close`."""

    def __init__(self, bundle: Bundle, device: Device, ort: Any) -> None:
        """Copy the file.

        Raises:
            DeviceMemoryError: it does not fit.
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
        """Of the device's copy of the file."""
        return self._address

    def initializers(self, graph: str) -> dict[str, Any]:
        """An `OrtValue` over the device's copy for each tensor that the graph reads from the file.

        Raises:
            BundleDamagedError: a tensor lies outside of the file.
        """
        file = self._bundle.graph(graph)
        values = {}
        for tensor in external_tensors(file.read_bytes()):
            if tensor.offset + tensor.length > self.nbytes:
                raise BundleDamagedError(
                    f"{file} reads {tensor.name} behind the end of {WEIGHTS_NAME}; export again"
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
        """Give the memory back."""
        if self._address:
            self._device.free(self._address)
            self._address = 0


def _upload(path: Path, device: Device, address: int) -> None:
    """Copy a file through two pinned buffers: one is read while the other is on its way."""
    buffers = [device.pinned(_CHUNK) for _ in range(2)]
    done, turn = 0, 0
    try:
        with path.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffers[turn].data):
                device.synchronize()  # the other buffer's copy, which ran while this was filled
                device.upload(address + done, buffers[turn][:size])
                done, turn = done + size, 1 - turn
        device.synchronize()
    finally:
        for buffer in buffers:
            device.unpin(buffer)
    if done != path.stat().st_size:
        raise BundleDamagedError(f"{path} changed while it was read; load again")
