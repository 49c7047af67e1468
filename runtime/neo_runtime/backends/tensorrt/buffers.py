"""The device buffers of a batch for a TensorRT plan, and its decode step.

    cache     [batch, heads, max_length, head_dim] per tensor, zeros at first; past is also present
    step      input_ids, position_ids, logit_positions [batch, 1], logits [batch, 1, vocab]

The first step runs directly; then it is captured as a CUDA graph over these addresses and replayed.
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
    """The buffers of a batch, with an execution context and a CUDA graph for the decode step.

    TensorRT requires a separate context for each captured graph.
    """

    def __init__(self, plan: LoadedPlan, device: Device, manifest: Manifest, batch: int) -> None:
        """Allocate the buffers.

        Raises:
            DeviceMemoryError: the device has too little free memory.
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
        """Queue setting all buffers to zero: masked values are still multiplied by 0."""
        for address, size in zip(self._blocks, self._sizes, strict=True):
            self._device.zero(address, size)

    def bound_cache(self) -> Tensors:
        """Address and shape of the past and present tensors of all layers, by name."""
        bound = {}
        for name, tensor in self.cache.items():
            bound[f"past_key_values.{name}"] = bound[f"present.{name}"] = tensor
        return bound

    def run(self, lock: Lock) -> None:
        """Queue the decode step.

        Args:
            lock: the backend's lock, which the caller holds.
        """
        if self._graph is not None:
            self._device.replay(self._graph)
            return
        self._queue()  # the first run, not captured, chooses and loads kernels
        if self._may_capture:
            self._device.synchronize()
            # If the garbage collector frees another model in this thread, the capture fails.
            with alone(lock):
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
        """Release the CUDA graph and the execution context."""
        if self._graph is not None:
            self._device.discard(self._graph)
        self._graph = self._context = None

    def free(self) -> None:
        """See `Pooled`."""
        self.release()
        for address in self._blocks:
            self._device.free(address)
