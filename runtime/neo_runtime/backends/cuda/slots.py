"""Slots: the device buffers of a batch, with the CUDA graph captured over their addresses.

    cache     keys and values of all layers, [batch, heads, length, head_dim] each
    inputs    input_ids, position_ids [batch, 1], attention_mask [batch, length]
    small     top_values, top_ids, exp_sum: copied to the host after each step
    logits    float32 [batch, 1, vocab]: copied to the host only when requested

Idle slots are kept with their CUDA graph, and reused for the same batch and length.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import ITEM_SIZES
from neo_runtime.backends.device.base import Layout
from neo_runtime.bundle.manifest import CANDIDATE_OUTPUTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.manifest import Manifest

__all__ = [
    "ELEMENT_TYPES",
    "CapturedStep",
    "Slot",
    "Tensors",
    "make_slot",
    "slot_layouts",
]

ELEMENT_TYPES: dict[str, Any] = {"float16": np.float16, "float32": np.float32, "bfloat16": 16}
"""Element types as onnxruntime's bindings take them: a numpy type, or ONNX's number for it."""

Tensors = dict[str, tuple[int, Any, tuple[int, ...]]]
"""Address, element type (see `ELEMENT_TYPES`) and shape of tensors, by name."""


@dataclass(frozen=True)
class CapturedStep:
    """Identifies a slot's CUDA graph, which onnxruntime keeps per session and thread."""

    graph_id: int
    """`gpu_graph_id` of the runs that replay it."""
    session: int
    """Number of the decode session, from 0."""
    thread: int
    """Thread that captured it, as `OneThread.settle` returns it."""


@dataclass(eq=False)
class Slot:
    """The buffers for one batch and length, and the binding of the decode graph over them."""

    device: Device
    batch: int
    length: int
    nbytes: int
    """Bytes on the device, all blocks together."""
    cache_size: int
    """Bytes of the cache block."""
    cache: Tensors
    """By name of the graph's input (`past_key_values.…`)."""
    inputs: Tensors
    small: Tensors
    logits: Tensors
    addresses: tuple[int, int, int, int]
    """Addresses of the blocks: cache, inputs, small outputs, logits."""
    host_mask: NDArray[np.int64]
    """[batch, length], pinned."""
    host_ids: NDArray[np.int64]
    """[2, batch], pinned: token ids, positions."""
    host_small: NDArray[np.uint8]
    """Host copy of the block `small`, pinned."""
    binding: Any = None
    """Binding of the decode graph, made on its first run. It keeps the session alive."""
    captured: CapturedStep | None = None
    """The CUDA graph of the decode session, once captured."""
    step: Any = None
    """The CUDA graph of the decode kernels, once captured."""

    @property
    def key(self) -> tuple[int, ...]:
        """See `Pooled`."""
        return self.batch, self.length

    def clear(self) -> None:
        """Queue: set the cache to zero.

        Kernels may compute with masked positions too, so these must be finite, which an earlier
        request's values may not be.
        """
        self.device.zero(self.addresses[0], self.cache_size)

    def release(self) -> None:
        """Release the binding and the CUDA graph."""
        self.binding = self.captured = None
        if self.step is not None:
            self.device.discard(self.step)
            self.step = None

    def free(self) -> None:
        """See `Pooled`."""
        self.release()
        for address in self.addresses:
            self.device.free(address)
        for array in (self.host_mask, self.host_ids, self.host_small):
            self.device.unpin(array)


def make_slot(manifest: Manifest, device: Device, batch: int, length: int) -> Slot:
    """Allocate a slot.

    Raises:
        DeviceMemoryError: the device has too little free memory.
        HostMemoryError: the host has too little memory to pin.
    """
    layouts = slot_layouts(manifest, batch, length)
    with ExitStack() as undone:  # frees the others if an allocation fails
        blocks = []
        for layout in layouts:
            blocks.append(device.allocate(layout.size))
            undone.callback(device.free, blocks[-1])
        pinned = []
        for size in (8 * batch * length, 16 * batch, layouts[2].size):
            pinned.append(device.pinned(size))
            undone.callback(device.unpin, pinned[-1])
        undone.pop_all()
    cache, inputs, small, logits = (
        layout.tensors(address) for layout, address in zip(layouts, blocks, strict=True)
    )
    return Slot(
        device=device,
        batch=batch,
        length=length,
        nbytes=sum(layout.size for layout in layouts),
        cache_size=layouts[0].size,
        cache=cache,
        inputs=inputs,
        small=small,
        logits=logits,
        addresses=(blocks[0], blocks[1], blocks[2], blocks[3]),
        host_mask=pinned[0].view(np.int64).reshape(batch, length),
        host_ids=pinned[1].view(np.int64).reshape(2, batch),
        host_small=pinned[2],
    )


def slot_layouts(manifest: Manifest, batch: int, length: int) -> tuple[Layout, ...]:
    """Layouts of the blocks of a slot: cache, inputs, small outputs, logits."""
    model, dtype = manifest.model, manifest.cache.dtype
    cache, inputs, small, logits = Layout(), Layout(), Layout(), Layout()
    shape = (batch, model.num_heads, length, model.head_dim)
    for layer in range(model.num_layers):
        for part in ("key", "value"):
            name = f"past_key_values.{layer}.{part}"
            cache.add(name, ELEMENT_TYPES[dtype], shape, ITEM_SIZES[dtype])
    inputs.add("input_ids", np.int64, (batch, 1), 8)
    inputs.add("position_ids", np.int64, (batch, 1), 8)
    inputs.add("attention_mask", np.int64, (batch, length), 8)
    outputs = {tensor.name: tensor for tensor in manifest.graphs["decode"].outputs}
    for name in CANDIDATE_OUTPUTS:
        kind = np.dtype(outputs[name].dtype)
        widths = tuple(int(size) for size in outputs[name].shape[1:])
        small.add(name, kind.type, (batch, *widths), kind.itemsize)
    logits.add("logits", np.float32, (batch, 1, model.vocab_size), 4)
    return cache, inputs, small, logits
