"""Cache layout `in_place` in device memory.

Decode always computes all rows of the slot, so that addresses and shapes never change and its
captured CUDA graph can be replayed. The mask of an unused row has one position.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from neo_runtime.backends.base import ITEM_SIZES
from neo_runtime.backends.cuda.slots import ELEMENT_TYPES, Slot, Tensors
from neo_runtime.backends.device.base import Layout
from neo_runtime.backends.device.rows import CacheTensors, DeviceRowsStore
from neo_runtime.backends.right_padded import RightPaddedStore
from neo_runtime.backends.step_logits import CandidateRows, StepLogits
from neo_runtime.bundle.manifest import CANDIDATE_OUTPUTS
from neo_runtime.closable import of_open_cache

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.manifest import Manifest


__all__ = ["DeviceStore"]

_BFLOAT16 = ELEMENT_TYPES["bfloat16"]
_SPOILED = 1000.0
"""Far from any real key or value, and finite in float16 and bfloat16."""


class Steps(Protocol):
    """What the store needs of its backend; see `CudaBackend`."""

    manifest: Manifest
    device: Device
    lock: threading.Lock

    def take_slot(self, batch: int, length: int) -> Slot:
        """A slot with the cache set to zero."""

    def give_back(self, slot: Slot) -> None:
        """Return a slot that is no longer in use."""

    def allocate(self, size: int) -> int:
        """Allocate device memory."""

    def block(self, size: int) -> AbstractContextManager[int]:
        """A context manager with device memory; yields the address."""

    def run(self, graph: str, inputs: Tensors, outputs: Tensors) -> None:
        """Queue a graph on these inputs and outputs."""

    def decode(self, slot: Slot) -> None:
        """Queue one decode step on a slot's buffers."""


class DeviceStore(DeviceRowsStore, RightPaddedStore):
    """A `CacheStore` in device memory."""

    def __init__(self, backend: Steps, batch: int, length: int) -> None:
        self._backend, self._device = backend, backend.device
        self._slot: Slot | None = backend.take_slot(batch, length)
        self._give_back = weakref.finalize(self, backend.give_back, self._slot)
        self._give_back.atexit = False  # the system frees everything when the process ends
        self.lengths = np.zeros(batch, dtype=np.int64)
        self._is_mask_stale = True

    @property
    def slot(self) -> Slot:
        """The buffers.

        Raises:
            NeoError: the store is closed, perhaps by another thread before logits were fetched.
        """
        return of_open_cache(self._slot)

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
        """Run a graph on `len(ids)` rows from `row` on, and wait for it.

        Args:
            graph: "prefill" or "score".
            row: first row.
            ids: int64 [rows, n].
            mask: int64 [rows, past + n].
            positions: int64 [rows, n].
            logits: output "logits" in device memory; None for the slot's.
        """
        layout = Layout()
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name, array in arrays.items():
            layout.add(name, np.int64, array.shape, 8)
        with self._backend.lock:
            block = self._backend.allocate(layout.size)
            try:
                for name, array in arrays.items():
                    self._device.upload(block + layout.offset(name), array)
                inputs = layout.tensors(block)
                cache = _rows(self.slot.cache, row, len(ids))
                outputs = _rows(self.slot.logits, row, len(ids)) if logits is None else logits
                if graph != "score":
                    outputs = outputs | _rows(self.slot.small, row, len(ids))
                self._backend.run(graph, inputs | cache, outputs)
                self._device.synchronize()
            finally:
                self._device.free(block)

    def score(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """See `CacheStore.score`."""
        with self._backend.block(logits.nbytes) as block:
            outputs: Tensors = {"logits": (block, np.float32, (1, *logits.shape))}
            self.run_chunk("score", 0, *self._behind(0, ids), outputs)
            with self._backend.lock:
                self._device.download(logits, block)
                self._device.synchronize()
        self.lengths[0] += len(ids)
        self._rows_changed()

    def crop(self, lengths: NDArray[np.int64]) -> None:
        """See `CacheStore.crop`."""
        self.lengths = lengths
        self._rows_changed()

    def _after_prefill(self) -> StepLogits:
        self._rows_changed()
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
            self._backend.decode(slot)
            self.lengths += 1
            return self._step()

    def _upload_mask(self) -> None:
        """Update the device's mask: only where the new tokens go, or all of it if it is stale."""
        slot, batch = self.slot, self.batch
        mask = slot.host_mask.reshape(-1)
        first, last = 0, mask.size - 1
        if self._is_mask_stale:
            slot.host_mask[:] = 0
            slot.host_mask[batch:, 0] = 1  # unused rows
            slot.host_mask[:batch] = np.arange(slot.length) <= self.lengths[:, None]
            self._is_mask_stale = False
        else:
            places = np.arange(batch) * slot.length + self.lengths
            mask[places] = 1
            first, last = int(places[0]), int(places[-1])
        address = slot.inputs["attention_mask"][0]
        self._device.upload(address + 8 * first, mask[first : last + 1])

    def _step(self) -> StepLogits:
        """The results of the last call: small outputs are copied now, logits when requested."""
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
        """Copy the logits of the rows in use from the device: float32 [batch, vocab]."""
        logits = np.empty((self.batch, self._backend.manifest.model.vocab_size), np.float32)
        with self._backend.lock:
            self._device.download(logits, self.slot.addresses[3])
            self._device.synchronize()
        return logits

    def contents(self) -> list[NDArray[Any]]:
        """See `CacheStore.contents`. Returns copies."""
        found = []
        with self._backend.lock:
            for address, dtype, shape in self.slot.cache.values():
                held = np.empty(shape, np.uint16 if dtype == _BFLOAT16 else dtype)
                self._device.download(held, address)
                found.append(held)
            self._device.synchronize()
        if self._backend.manifest.cache.dtype == "bfloat16":
            found = [(held.astype(np.uint32) << 16).view(np.float32) for held in found]
        return [held[: self.batch] for held in found]

    def spoil(self) -> None:
        """See `CacheStore.spoil`. The value is finite: masked values are still multiplied by 0."""
        value = np.array(_SPOILED, np.float32)
        with self._backend.lock:
            for address, dtype, shape in self.slot.cache.values():
                if dtype == _BFLOAT16:
                    filled = np.full(shape, value.view(np.uint32) >> 16, dtype=np.uint16)
                else:
                    filled = np.full(shape, value, dtype=dtype)
                self._device.upload(address, filled)
                self._device.synchronize()

    def _tensors(self) -> CacheTensors:
        tensors = list(self.slot.cache.values())
        _, heads, length, head_dim = tensors[0][2]
        addresses = [address for address, _, _ in tensors]
        item = ITEM_SIZES[self._backend.manifest.cache.dtype]
        return CacheTensors(
            self._device, self._backend.allocate, addresses, heads, length, head_dim * item
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._backend.lock:
            yield
            self._device.synchronize()

    def _rows_changed(self) -> None:
        self._is_mask_stale = True

    def close(self) -> None:
        """See `CacheStore.close`."""
        self._give_back()
        self._slot = None


def _rows(tensors: Tensors, row: int, count: int) -> Tensors:
    """Tensors of `count` rows from `row` on; the rows of a batch are contiguous."""
    chosen: Tensors = {}
    for name, (address, dtype, shape) in tensors.items():
        item = 2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize
        stride = int(np.prod(shape[1:], dtype=np.int64)) * item
        chosen[name] = (address + row * stride, dtype, (count, *shape[1:]))
    return chosen
