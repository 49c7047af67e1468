"""The TensorRT backend: one engine with one copy of the weights, and several execution contexts.

    contexts of DECODE_PROFILE     one token per row; one context per cache, captured and replayed
    context of PREFILL_PROFILE     chunks of prompts of all rows together, and scoring

Keys and values are [batch, heads, max_length, head_dim]. Past and present have the same address, as
the engine's aliased tensors require. `position_ids[:, 0]` says where a row's new tokens go, so rows
of any lengths run together, padded on the right.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.base import Backend, CacheStore, position_bytes
from neo_runtime.backends.device.blocks import new_blocks
from neo_runtime.backends.device.idle_pool import IdlePool
from neo_runtime.backends.device.leftovers import Leftovers
from neo_runtime.backends.device.locks import new_lock
from neo_runtime.backends.tensorrt.buffers import StepBuffers
from neo_runtime.backends.tensorrt.plan import LoadedPlan, choose_plan
from neo_runtime.backends.tensorrt.store import TensorRTStore
from neo_runtime.bundle.engine_record import PREFILL_PROFILE
from neo_runtime.closable import closed_on_error
from neo_runtime.errors import CacheLimitError

if TYPE_CHECKING:
    from neo_runtime.backends.base import BlockPool
    from neo_runtime.backends.device.base import Device
    from neo_runtime.backends.tensorrt.plan import Tensors
    from neo_runtime.bundle.engine_record import EngineRecord
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.machine.gpu import GpuFacts

__all__ = ["TensorRTBackend"]


class TensorRTBackend(Backend):
    """Runs a TensorRT plan. Calls are serialized, because there is one stream."""

    def __init__(self, bundle: Bundle, device: Device, gpu: GpuFacts, platform: str) -> None:
        """Choose a plan by its record, and load it.

        Args:
            bundle: an opened bundle exported for target `tensorrt`.
            device: the device to run on; `close` also closes it.
            gpu: the device's properties.
            platform: operating system and processor, such as "linux-x86_64".

        Raises:
            EngineError: no plan fits this machine, or the one that does is damaged.
            DependencyError: TensorRT is not installed.
            DeviceMemoryError: the plan's activations do not fit into device memory.
        """
        chosen = choose_plan(bundle, gpu, platform)
        self.manifest, self.device, self.lock = bundle.manifest, device, new_lock()
        self._leftovers = Leftovers(self.lock)
        self.record: EngineRecord = chosen.record
        """The record of the loaded plan."""
        self.default_chunk = self.record.options.max_length
        self.default_batch = self.record.options.max_batch
        self.scored_at_once = min(self.default_chunk, self.record.options.max_logit_positions)
        with self.lock:
            self.plan = LoadedPlan(chosen, device)
            with closed_on_error(self.plan):
                self._prefill = [self.plan.new_context(PREFILL_PROFILE)]
        make = partial(StepBuffers, self.plan, device, self.manifest)
        self._steps: IdlePool[StepBuffers] = IdlePool(make, most_idle=self.record.size)
        everything = partial(_let_go, self.plan, self._prefill, self._steps, device)
        self._end = self._leftovers.at_end_of(self, everything)

    def queue_prefill(self, tensors: Tensors) -> None:
        """Queue one prefill chunk. The caller holds the lock."""
        self.plan.check_open()
        self.plan.queue(self._prefill[0], tensors)

    def allocate(self, size: int) -> int:
        """Allocate device memory, freeing idle caches if needed. The caller holds the lock."""
        return self._steps.with_room(partial(self.device.allocate, size))

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`. A static cache always has the bundle's `max_length`."""
        return position_bytes(self.manifest) * batch * self.manifest.max_length

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`.

        Raises:
            CacheLimitError: the plan was built for smaller or larger batches.
        """
        least, most = self.record.options.min_batch, self.record.options.max_batch
        if batch > most:
            raise CacheLimitError(
                f"the batch has {batch} sequences, but the plan {self.record.file} was built for "
                f"at most {most}; lower batch_size, or build another plan with neo-engine "
                "--max-batch"
            )
        if batch < least:
            raise CacheLimitError(
                f"the batch has {batch} sequences, but the plan {self.record.file} was built for "
                f"at least {least}; use larger batches, or build another plan with neo-engine "
                "--min-batch 1"
            )
        return TensorRTStore(self, batch)

    def open_pool(self, slots: int, block_size: int) -> BlockPool:
        """See `Backend.open_pool`."""
        return new_blocks(
            self.manifest, self.device, self._steps, self._leftovers, slots, block_size
        )

    def take_buffers(self, batch: int) -> StepBuffers:
        """Buffers for a store, set to zero.

        Raises:
            DeviceMemoryError: the device has too little free memory.
            NeoError: the model is closed.
        """
        with self._leftovers.cleared():
            self.plan.check_open()
            return self._steps.take(batch)

    def give_back(self, buffers: StepBuffers) -> None:
        """Take back the buffers of a store that was closed or garbage-collected."""
        # The queued work must not refer to this backend, or it would keep it alive.
        self._leftovers.leave(partial(self._steps.give, buffers))

    def close(self) -> None:
        """See `Backend.close`. Open caches keep their memory until they are closed."""
        if self._leftovers.is_abandoned:
            return
        with self.lock:
            if self.plan.is_closed:
                return
            self._leftovers.clear()
            self._end.detach()
            _let_go(self.plan, self._prefill, self._steps, self.device)
        self._leftovers.settle()  # a cache may have been closed meanwhile


def _let_go(
    plan: LoadedPlan, prefill: list[Any], steps: IdlePool[StepBuffers], device: Device
) -> None:
    """Release everything except buffers in use by stores. Nothing else may use the device."""
    for buffers in steps.items:
        buffers.release()
    prefill.clear()
    plan.close()
    steps.close(device.close)
