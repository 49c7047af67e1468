"""The CUDA backend: all graphs share one copy of the weights, and decode steps are CUDA graphs.

All device access goes through `Device`. With a device of host memory the same code runs on the CPU
provider, which is how it is tested without a GPU.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.base import Backend, position_bytes
from neo_runtime.backends.cuda.kernels import LoadedKernels
from neo_runtime.backends.cuda.one_thread import OneThread
from neo_runtime.backends.cuda.sessions import CudaSessions
from neo_runtime.backends.cuda.slots import (
    ELEMENT_TYPES,
    CapturedStep,
    Slot,
    make_slot,
)
from neo_runtime.backends.cuda.store import DeviceStore
from neo_runtime.backends.device.blocks import new_blocks
from neo_runtime.backends.device.idle_pool import IdlePool
from neo_runtime.backends.device.leftovers import Leftovers
from neo_runtime.backends.device.locks import alone, new_lock
from neo_runtime.closable import closed_on_error
from neo_runtime.errors import BundleUnsupportedError
from neo_runtime.machine.installation import require_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from neo_runtime.backends.base import BlockPool, CacheStore
    from neo_runtime.backends.cuda.slots import Tensors
    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.manifest import Manifest
    from neo_runtime.bundle.step_kernels import StepKernels

__all__ = ["CudaBackend", "why_not_cuda"]

_LENGTHS = 256
"""Cache lengths are rounded up to a multiple of this, so that slots and CUDA graphs are reused."""
_MOST_GRAPHS = 64
"""Most CUDA graphs per session; onnxruntime frees them only with the session."""


def why_not_cuda(manifest: Manifest) -> str | None:
    """Why this backend cannot run a bundle; None if it can."""
    if manifest.target != "cuda":
        return f"it was exported for {manifest.target}; export with --target cuda"
    if manifest.cache.dtype not in ELEMENT_TYPES:
        return f"it keeps keys and values in {manifest.cache.dtype}; export without --kv-cache"
    if manifest.cache.layout != "in_place":
        return (
            f"its head_dim is {manifest.model.head_dim}, but the fused attention, which updates "
            "the KV cache in place, needs a multiple of 8; use backend cpu"
        )
    return None


class CudaBackend(Backend):
    """Sessions are made on first use. Calls are serialized, because there is one stream."""

    default_chunk = 2048
    default_batch = 32
    captures = True
    """Whether decode steps are captured as a CUDA graph and replayed."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        session_config: Mapping[str, str] | None = None,
        kernels: StepKernels | None = None,
    ) -> None:
        """Copy the weights to the device.

        Args:
            bundle: an opened bundle exported for target `cuda`.
            device: the device to run on; `close` also closes it.
            session_config: more session configuration entries.
            kernels: decode kernels that fit the bundle and the device. They replace the decode
                graph for the batch sizes that they support.

        Raises:
            BundleUnsupportedError: the bundle was exported for another backend.
            EngineError: a decode kernel is damaged, or cannot be loaded.
            DeviceMemoryError: the weights do not fit into device memory.
        """
        reason = why_not_cuda(bundle.manifest)
        if reason is not None:
            raise BundleUnsupportedError(f"{bundle.path} does not run on backend cuda: {reason}")
        self._bundle, self.manifest, self.device = bundle, bundle.manifest, device
        self.lock = new_lock()
        """Held while the device is in use: keeps the copies and kernels of one call together, and
        prevents allocations during a capture."""
        with self.lock:
            self._sessions = CudaSessions(
                bundle,
                device,
                require_onnxruntime(),
                source=self._source(),
                captures=self.captures,
                config=session_config or {},
            )
        make = partial(make_slot, self.manifest, device)
        self.slots: IdlePool[Slot] = IdlePool(make, most_idle=self._sessions.weight_bytes)
        self._thread = OneThread()
        self._graph_ids = itertools.count(1)
        self._captured_by_session = 0
        self._session_number = 0
        self._leftovers = Leftovers(self.lock)
        self._kernels: LoadedKernels | None = None
        if kernels is not None:
            with closed_on_error(self._sessions), self.lock:
                self._kernels = LoadedKernels(kernels, device, self.allocate)
        everything = partial(
            _let_go, self._sessions, self.slots, self._thread, self._kernels, device
        )
        self._end = self._leftovers.at_end_of(self, everything)

    def _source(self) -> Callable[[str], str | bytes]:
        """A function from a graph's name to its path or serialized model.

        It must not refer to the backend, which could otherwise never become garbage.
        """
        bundle = self._bundle
        return lambda graph: str(bundle.graph(graph))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the device."""
        return self._sessions.weight_bytes

    def prepare(self, graphs: Sequence[str] = ("prefill", "decode")) -> None:
        """See `Backend.prepare`."""
        with self.lock:
            for graph in graphs:
                if graph == "decode" and self._kernels is not None:
                    continue  # needed only for batches that the kernels do not support
                self.slots.with_room(partial(self._sessions.get, graph))

    def allocate(self, size: int) -> int:
        """Allocate device memory, freeing idle slots if needed. The caller holds the lock."""
        return self.slots.with_room(partial(self.device.allocate, size))

    def run(self, graph: str, inputs: Tensors, outputs: Tensors) -> None:
        """Queue a graph on these inputs and outputs. The caller holds the lock."""
        self.slots.with_room(partial(self._run, graph, inputs, outputs))

    def _run(self, graph: str, inputs: Tensors, outputs: Tensors) -> None:
        self.run_bound(graph, self._sessions.bind(graph, inputs, outputs))

    def run_bound(self, graph: str, binding: Any) -> None:
        """Queue a graph on a binding. The caller holds the lock."""
        self._sessions.run(graph, binding)

    def decode(self, slot: Slot) -> None:
        """Queue one decode step on a slot's buffers. The caller holds the lock."""
        if self._kernels is not None and self._kernels.takes(slot.batch):
            step = partial(self._kernels.decode, slot, self._sessions.weights.address)
            # If the garbage collector frees another model in this thread, the capture fails.
            with alone(self.lock) if slot.step is None else nullcontext():
                self.slots.with_room(step)
            return
        if not self.captures:
            self.run("decode", slot.inputs | slot.cache, slot.logits | slot.small)
            return
        found, thread = slot.captured, self._thread.settle()
        if found is None or (found.session, found.thread) != (self._session_number, thread):
            with alone(self.lock):
                self.slots.with_room(partial(self._capture, slot))
        else:
            self._replay(slot, found.graph_id)

    def _replay(self, slot: Slot, graph_id: int) -> None:
        run = partial(self._sessions.run, "decode", slot.binding, graph_id)
        self._thread.run(run)

    def _capture(self, slot: Slot) -> None:
        """Run a slot's first step, which onnxruntime captures."""
        if self._captured_by_session >= _MOST_GRAPHS:
            self._renew_session()
        if slot.binding is None:
            inputs, outputs = slot.inputs | slot.cache, slot.logits | slot.small
            slot.binding = self._sessions.bind("decode", inputs, outputs)
        graph_id = next(self._graph_ids)
        self._captured_by_session += 1
        thread = self._thread.settle()
        self._replay(slot, graph_id)
        slot.captured = CapturedStep(graph_id, self._session_number, thread)

    def _renew_session(self) -> None:
        for slot in self.slots.items:
            slot.binding = slot.captured = None
        self._sessions.drop("decode")
        self._session_number += 1
        self._captured_by_session = 0

    def _capacity(self, length: int) -> int:
        """Length of the buffers for sequences of up to `length` positions; at least 2.

        With a length of 1, the graph would take every decode step for a prefill without a past.
        """
        rounded = -(-length // _LENGTHS) * _LENGTHS
        return max(2, min(rounded, self.manifest.max_length))

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`."""
        return position_bytes(self.manifest) * batch * self._capacity(length)

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""
        return DeviceStore(self, batch, self._capacity(length))

    def open_pool(self, slots: int, block_size: int) -> BlockPool:
        """See `Backend.open_pool`."""
        return new_blocks(
            self.manifest, self.device, self.slots, self._leftovers, slots, block_size
        )

    @contextmanager
    def block(self, size: int) -> Iterator[int]:
        """A context manager with `size` bytes of device memory; yields the address."""
        with self.lock:
            block = self.allocate(size)
        try:
            yield block
        finally:
            with self.lock:
                self.device.free(block)

    def take_slot(self, batch: int, length: int) -> Slot:
        """A slot for a store, with keys and values set to zero.

        Raises:
            DeviceMemoryError: the device has too little free memory.
        """
        with self._leftovers.cleared():
            return self.slots.take(batch, length)

    def give_back(self, slot: Slot) -> None:
        """Take back the slot of a store that was closed or garbage-collected."""
        # The queued work must not refer to this backend, or it would keep it alive.
        self._leftovers.leave(partial(self.slots.give, slot))

    def close(self) -> None:
        """See `Backend.close`. Open caches keep their memory until they are closed."""
        if self._leftovers.is_abandoned:
            return
        with self.lock:
            if self._sessions.is_closed:
                return
            self._leftovers.clear()
            self._end.detach()
            _let_go(self._sessions, self.slots, self._thread, self._kernels, self.device)
        self._leftovers.settle()  # a cache may have been closed meanwhile


def _let_go(
    sessions: CudaSessions,
    slots: IdlePool[Slot],
    thread: OneThread,
    kernels: LoadedKernels | None,
    device: Device,
) -> None:
    """Release everything except slots in use by stores. Nothing else may use the device."""
    for slot in slots.items:
        slot.release()
    if kernels is not None:
        kernels.close()
    thread.close()
    sessions.close()
    slots.close(device.close)
