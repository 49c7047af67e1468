"""The buffers of a batch in device memory, each bound once, and kept for the next of its size.

    cache     keys and values of all layers, [batch, heads, length, head_dim] each
    inputs    input_ids, position_ids [batch, 1], attention_mask [batch, length]
    small     top_values, top_ids, exp_sum: what a step sends back
    logits    float32 [batch, 1, vocab]: stay, and are fetched only when asked for

These make a *slot*, and its captured CUDA graph is over their addresses. Some of those that are
given back are kept, graph and all.
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
"""What onnxruntime takes for a type: a numpy type, or ONNX's number of it."""

Tensors = dict[str, tuple[int, Any, tuple[int, ...]]]


@dataclass(frozen=True)
class CapturedStep:
    """Where a slot's CUDA graph lies: onnxruntime keeps it with a session and a thread."""

    graph_id: int
    """`gpu_graph_id` of the runs that replay it."""
    session: int
    """Number of the decode session, counted from 0."""
    thread: int
    """Number of the thread, counted from 0."""


@dataclass(eq=False)
class Slot:
    """The buffers for one batch and length, and the binding of the decode graph over them."""

    device: Device
    batch: int
    length: int
    nbytes: int
    """On the device, of it `cache_size` keys and values."""
    cache_size: int
    cache: Tensors
    """By the graph's input name."""
    inputs: Tensors
    small: Tensors
    logits: Tensors
    addresses: tuple[int, int, int, int]
    """Of the four blocks, cache first."""
    host_mask: NDArray[np.int64]
    """[batch, length], pinned."""
    host_ids: NDArray[np.int64]
    """[2, batch], pinned: token ids, positions."""
    host_small: NDArray[np.uint8]
    """The block `small`, pinned."""
    binding: Any = None
    """Of the decode graph, made when it first runs. It holds its session."""
    captured: CapturedStep | None = None
    """Its CUDA graph, once onnxruntime captured it."""
    step: Any = None
    """The CUDA graph of a bundle's own kernels, once captured."""

    @property
    def key(self) -> tuple[int, ...]:
        """See `Pooled`."""
        return self.batch, self.length

    def clear(self) -> None:
        """Queue: write zeros to the cache.

        Masked positions may pass through kernels, so what is there must be finite, and an earlier
        request may have left what is not.
        """
        self.device.zero(self.addresses[0], self.cache_size)

    def release(self) -> None:
        """Let go of what is a session's or a kernel's."""
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
    """Allocate the buffers for one batch and length.

    Raises:
        DeviceMemoryError: the device has no room.
    """
    layouts = slot_layouts(manifest, batch, length)
    with ExitStack() as undone:  # if something does not fit
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
    """Cache, inputs, small outputs and logits of a slot."""
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
