"""Cache layout `in_place` in device memory, with every buffer bound once.

    block     keys and values of all layers, [batch, heads, length, head_dim] each
    inputs    input_ids, position_ids [batch, 1], attention_mask [batch, length]
    small     top_values, top_ids, exp_sum: what a step sends back
    logits    float32 [batch, 1, vocab]: stay, and are fetched only when asked for

These make a *slot*. Decoding always computes all rows of a slot, so that addresses and shapes never
change and a captured CUDA graph can be replayed; a row that is not in use has one position. Slots
of closed stores are kept for the next store of that size, graph and all (`SlotPool`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.device import Layout, move_rows
from neo_runtime.backends.in_place import RightPaddedStore
from neo_runtime.errors import DeviceMemoryError
from neo_runtime.manifest import CANDIDATE_OUTPUTS
from neo_runtime.step_logits import CandidateRows, StepLogits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.backends.cuda import CudaBackend
    from neo_runtime.backends.device import Device
    from neo_runtime.manifest import Manifest

__all__ = ["ELEMENT_TYPES", "ITEM_SIZES", "DeviceStore", "Slot", "SlotPool"]

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
    sizes: tuple[int, int, int, int]
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
        addresses: list[int] = []
        try:
            addresses.extend(self._device.allocate(layout.size) for layout in layouts)
        except BaseException:
            for address in addresses:
                self._device.free(address)
            raise
        cache, inputs, small, logits = (
            layout.tensors(address) for layout, address in zip(layouts, addresses, strict=True)
        )
        sizes = tuple(layout.size for layout in layouts)
        # Whatever lies there must be finite: masked positions still pass through the kernels.
        self._device.zero(addresses[0], sizes[0])
        self._made += 1
        pinned = self._device.pinned
        return Slot(
            batch=batch,
            length=length,
            graph_id=self._made,
            cache=cache,
            inputs=inputs,
            small=small,
            logits=logits,
            addresses=(addresses[0], addresses[1], addresses[2], addresses[3]),
            sizes=(sizes[0], sizes[1], sizes[2], sizes[3]),
            host_mask=pinned(8 * batch * length).view(np.int64).reshape(batch, length),
            host_ids=pinned(16 * batch).view(np.int64).reshape(2, batch),
            host_small=pinned(sizes[2]),
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


class DeviceStore(RightPaddedStore):
    """See the module."""

    def __init__(self, backend: CudaBackend, batch: int, length: int) -> None:
        self._backend, self._device = backend, backend.device
        with backend.lock:
            self._slot: Slot | None = backend.slots.take(batch, length)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self._is_mask_stale = True

    @property
    def slot(self) -> Slot:
        """The buffers; the store must be open."""
        assert self._slot is not None
        return self._slot

    def _run_prefill(
        self,
        row: int,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        self.run_chunk("prefill", row, ids, mask, positions)

    def run_chunk(
        self,
        graph: str,
        row: int,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits: Tensors | None = None,
    ) -> None:
        """Run several new tokens of the rows from `row` on; where logits go, None for the slot."""
        layout = Layout()
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name, array in arrays.items():
            layout.add(name, np.int64, array.shape, 8)
        with self._backend.lock:
            block = self._device.allocate(layout.size)
            try:
                for name, array in arrays.items():
                    self._device.upload(block + layout.offset(name), array)
                inputs = layout.tensors(block)
                cache = _rows(self.slot.cache, row, len(ids))
                outputs = _rows(self.slot.logits, row, len(ids)) if logits is None else logits
                if graph != "score":
                    outputs = outputs | _rows(self.slot.small, row, len(ids))
                binding = self._backend.bind(graph, inputs | cache, outputs)
                self._backend.run(graph, binding, None)
                self._device.synchronize()
            finally:
                self._device.free(block)

    def _after_prefill(self) -> StepLogits:
        self._is_mask_stale = True
        with self._backend.lock:
            return self._step()

    def decode(self, tokens: NDArray[np.int64]) -> StepLogits:
        """See `CacheStore.decode`."""
        slot, batch = self.slot, self.batch
        with self._backend.lock:
            slot.host_ids[:] = 0
            slot.host_ids[0, :batch] = tokens
            slot.host_ids[1, :batch] = self.lengths
            self._upload_mask()
            for index, name in enumerate(("input_ids", "position_ids")):
                self._device.upload(slot.inputs[name][0], slot.host_ids[index])
            if slot.binding is None:
                outputs = slot.logits | slot.small
                slot.binding = self._backend.bind("decode", slot.inputs | slot.cache, outputs)
            self._backend.run("decode", slot.binding, slot.graph_id)
            self.lengths += 1
            return self._step()

    def _upload_mask(self) -> None:
        """Bring the device's mask up to date: the slots that the new tokens take, or all of it."""
        slot, batch = self.slot, self.batch
        mask = slot.host_mask.reshape(-1)
        first, last = 0, mask.size - 1
        if self._is_mask_stale:
            slot.host_mask[:] = 0
            slot.host_mask[batch:, 0] = 1  # rows that are not in use
            slot.host_mask[:batch] = np.arange(slot.length) <= self.lengths[:, None]
            self._is_mask_stale = False
        else:
            places = np.arange(batch) * slot.length + self.lengths
            mask[places] = 1
            first, last = int(places[0]), int(places[-1])
        address = slot.inputs["attention_mask"][0]
        self._device.upload(address + 8 * first, mask[first : last + 1])

    def _step(self) -> StepLogits:
        """What the last call wrote: the small outputs are fetched, the logits are left there."""
        slot, batch = self.slot, self.batch
        self._device.download(slot.host_small, slot.addresses[2])
        self._device.synchronize()
        found = [self._small(name)[:batch, ...].copy() for name in CANDIDATE_OUTPUTS]
        rows = CandidateRows(found[0][:, 0], found[1][:, 0], found[2][:, 0])
        vocab_size = self._backend.manifest.model.vocab_size
        return StepLogits(batch, vocab_size, self._fetch, rows)

    def _small(self, name: str) -> NDArray[Any]:
        address, dtype, shape = self.slot.small[name]
        start = address - self.slot.addresses[2]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.slot.host_small[start : start + size].view(dtype).reshape(shape)

    def _fetch(self) -> NDArray[np.float32]:
        """All logits of the rows in use, float32 [batch, vocab]."""
        logits = np.empty((self.batch, self._backend.manifest.model.vocab_size), np.float32)
        with self._backend.lock:
            self._device.download(logits, self.slot.addresses[3])
            self._device.synchronize()
        return logits

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """See `CacheStore.reorder`."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if len(moved):
            sources = rows[moved]
            _, heads, length, head_dim = next(iter(self.slot.cache.values()))[2]
            item = ITEM_SIZES[self._backend.manifest.cache.dtype]
            with self._backend.lock:
                move_rows(
                    self._device,
                    [address for address, _, _ in self.slot.cache.values()],
                    (heads, length, head_dim * item),
                    int(self.lengths[sources].max()),
                    sources.tolist(),
                    moved.tolist(),
                )
        self.lengths = self.lengths[rows]
        self._is_mask_stale = True

    def close(self) -> None:
        """See `CacheStore.close`."""
        if self._slot is not None:
            self._backend.give_back(self._slot)
            self._slot = None


def _rows(tensors: Tensors, row: int, count: int) -> Tensors:
    """The rows from `row` on, `count` of them: rows of a batch are contiguous."""
    chosen: Tensors = {}
    for name, (address, dtype, shape) in tensors.items():
        item = 2 if dtype == 16 else np.dtype(dtype).itemsize
        stride = int(np.prod(shape[1:], dtype=np.int64)) * item
        chosen[name] = (address + row * stride, dtype, (count, *shape[1:]))
    return chosen
