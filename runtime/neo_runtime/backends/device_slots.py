"""The buffers of a batch in device memory, each bound once, and kept for the next of its size.

    cache     keys and values of all layers, [batch, heads, length, head_dim] each
    inputs    input_ids, position_ids [batch, 1], attention_mask [batch, length]
    small     top_values, top_ids, exp_sum: what a step sends back
    logits    float32 [batch, 1, vocab]: stay, and are fetched only when asked for

These make a *slot*, and its captured CUDA graph is over their addresses. `SlotPool` keeps some of
those that are given back, graph and all.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.device import Layout
from neo_runtime.errors import DeviceMemoryError
from neo_runtime.manifest import CANDIDATE_OUTPUTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.backends.device import Device
    from neo_runtime.manifest import Manifest

__all__ = ["ELEMENT_TYPES", "ITEM_SIZES", "Slot", "SlotPool", "Tensors", "slot_layouts"]

ELEMENT_TYPES: dict[str, Any] = {"float16": np.float16, "float32": np.float32, "bfloat16": 16}
"""What onnxruntime takes for a type: a numpy type, or ONNX's number of it."""
ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
_KEPT = 4
"""Idle slots that a pool keeps."""

Tensors = dict[str, tuple[int, Any, tuple[int, ...]]]


@dataclass(eq=False)
class Slot:
    """The buffers for one batch and length, and the binding of the decode graph over them."""

    batch: int
    length: int
    graph_id: int
    """Names its captured graph: `gpu_graph_id` of a run."""
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
    """Of the decode graph, made when it first runs."""


class SlotPool:
    """Makes slots, and keeps some of those that are given back."""

    def __init__(self, manifest: Manifest, device: Device) -> None:
        self._manifest, self._device = manifest, device
        self._idle: list[Slot] = []
        self._taken: list[Slot] = []
        self._made = 0
        self._is_closed = False

    def take(self, batch: int, length: int) -> Slot:
        """A slot of this size; the contents of its cache are whatever was there.

        Raises:
            DeviceMemoryError: the device has no room, even without the idle slots.
        """
        fitting = [slot for slot in self._idle if (slot.batch, slot.length) == (batch, length)]
        if fitting:
            slot = fitting[-1]
            self._idle.remove(slot)
        else:
            try:
                slot = self._make(batch, length)
            except DeviceMemoryError:
                if not self._idle:
                    raise
                self._free_idle()
                slot = self._make(batch, length)
        self._taken.append(slot)
        return slot

    def give(self, slot: Slot) -> None:
        """Keep a slot for later; the oldest idle one beyond `_KEPT` is freed."""
        self._taken.remove(slot)
        self._idle.append(slot)
        while len(self._idle) > (0 if self._is_closed else _KEPT):
            self._free(self._idle.pop(0))

    def close(self) -> None:
        """Free the idle slots, and the others when they are given back."""
        self._is_closed = True
        self._free_idle()
        for slot in self._taken:
            slot.binding = None  # it holds its session

    @property
    def is_empty(self) -> bool:
        """Whether no slot is left."""
        return not self._idle and not self._taken

    def _free_idle(self) -> None:
        while self._idle:
            self._free(self._idle.pop())

    def _free(self, slot: Slot) -> None:
        slot.binding = None
        for address in slot.addresses:
            self._device.free(address)
        for array in (slot.host_mask, slot.host_ids, slot.host_small):
            self._device.unpin(array)

    def _make(self, batch: int, length: int) -> Slot:
        layouts = slot_layouts(self._manifest, batch, length)
        device = self._device
        with ExitStack() as undone:  # if something does not fit
            blocks = []
            for layout in layouts:
                blocks.append(device.allocate(layout.size))
                undone.callback(device.free, blocks[-1])
            pinned = []
            for size in (8 * batch * length, 16 * batch, layouts[2].size):
                pinned.append(device.pinned(size))
                undone.callback(device.unpin, pinned[-1])
            # Whatever lies there must be finite: masked positions still pass through the kernels.
            device.zero(blocks[0], layouts[0].size)
            undone.pop_all()
        cache, inputs, small, logits = (
            layout.tensors(address) for layout, address in zip(layouts, blocks, strict=True)
        )
        self._made += 1
        return Slot(
            batch=batch,
            length=length,
            graph_id=self._made,
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
