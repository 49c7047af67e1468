"""The buffers of a batch for a TensorRT plan, and its decode step.

    cache     [batch, heads, max_length, head_dim] a tensor, zeros at first, past and present in one
    step      input_ids, position_ids, logit_positions [batch, 1], logits [batch, 1, vocab]

The step is queued once as it is, then captured as a CUDA graph over these addresses, and replayed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import ITEM_SIZES
from neo_runtime.backends.device.base import Layout
from neo_runtime.backends.device.locks import alone
from neo_runtime.bundle.engine_record import DECODE_PROFILE
from neo_runtime.errors import DeviceError

if TYPE_CHECKING:
    from threading import Lock

    from neo_runtime.backends.device.base import Device
    from neo_runtime.backends.tensorrt.plan import LoadedPlan, Tensors
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["StepBuffers"]

_LOG = logging.getLogger("neo_runtime")


class StepBuffers:
    """The buffers of a batch, a context of its own for the decode step, and its CUDA graph.

    NVIDIA wants one context for each captured graph.
    """

    def __init__(self, plan: LoadedPlan, device: Device, manifest: Manifest, batch: int) -> None:
        """Allocate.

        Raises:
            DeviceMemoryError: the device has no room.
        """
        model, item = manifest.model, ITEM_SIZES[manifest.cache.dtype]
        shape = (batch, model.num_heads, manifest.max_length, model.head_dim)
        cache, step = Layout(), Layout()
        for layer in range(model.num_layers):
            for part in ("key", "value"):
                cache.add(f"{layer}.{part}", None, shape, item)
        for name in ("input_ids", "position_ids", "logit_positions"):
            step.add(name, np.int64, (batch, 1), 8)
        step.add("logits", np.float32, (batch, 1, model.vocab_size), 4)
        self.key = (batch,)
        self.nbytes = cache.size + step.size
        self._plan, self._device = plan, device
        self._sizes = cache.size, step.size
        self._graph: Any = None
        self._may_capture = True
        self._context: Any = plan.new_context(DECODE_PROFILE)
        self._blocks = [device.allocate(cache.size)]
        try:
            self._blocks.append(device.allocate(step.size))
        except BaseException:
            device.free(self._blocks[0])
            raise
        self.cache = {n: (a, s) for n, (a, _, s) in cache.tensors(self._blocks[0]).items()}
        self.step = {n: (a, s) for n, (a, _, s) in step.tensors(self._blocks[1]).items()}

    def clear(self) -> None:
        """Queue: a slot that was never written is masked, and still multiplied by 0."""
        for address, size in zip(self._blocks, self._sizes, strict=True):
            self._device.zero(address, size)

    def bound_cache(self) -> Tensors:
        """Past and present of every layer."""
        bound = {}
        for name, tensor in self.cache.items():
            bound[f"past_key_values.{name}"] = bound[f"present.{name}"] = tensor
        return bound

    def run(self, lock: Lock) -> None:
        """Queue the decode step. The caller holds the backend's lock, which this is."""
        if self._graph is not None:
            self._device.replay(self._graph)
            return
        self._queue()  # once without: kernels are chosen and loaded
        if self._may_capture:
            self._device.synchronize()
            with alone(lock):  # garbage of another model, freed by this thread, would spoil it
                self._may_capture = self._plan.can_capture(self._context) and self._capture()

    def _queue(self) -> None:
        self._plan.queue(self._context, self.step | self.bound_cache())

    def _capture(self) -> bool:
        try:
            self._graph = self._device.capture(self._queue)
        except DeviceError as error:
            _LOG.warning("decode steps run without a CUDA graph: %s", error)
            return False
        return True

    def release(self) -> None:
        """Let go of all that is the engine's."""
        if self._graph is not None:
            self._device.discard(self._graph)
        self._graph = self._context = None

    def free(self) -> None:
        """Give everything back."""
        self.release()
        for address in self._blocks:
            self._device.free(address)
