"""Keys and values of some sequences in device memory, for a TensorRT plan, and the decode step.

    cache     [batch, heads, max_length, head_dim] a tensor, zeros at first, past and present in one
    step      input_ids, position_ids, logit_positions [batch, 1], logits [batch, 1, vocab]

The step is queued once as it is, then captured as a CUDA graph over these addresses, and replayed.
"""

from __future__ import annotations

import logging
import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import CacheStore, with_empty_rows
from neo_runtime.backends.device import Layout, fill_row, move_rows
from neo_runtime.engine_record import DECODE_PROFILE
from neo_runtime.errors import DeviceError
from neo_runtime.step_logits import StepLogits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.device import Device
    from neo_runtime.backends.tensorrt import TensorRTBackend
    from neo_runtime.backends.tensorrt_plan import LoadedPlan, Tensors
    from neo_runtime.manifest import Manifest

__all__ = ["ITEM_SIZES", "StepBuffers", "TensorRTStore"]

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
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

    def run(self) -> None:
        """Queue the decode step. The caller holds the lock."""
        if self._graph is not None:
            self._device.replay(self._graph)
            return
        self._queue()  # once without: kernels are chosen and loaded
        if self._may_capture:
            self._device.synchronize()
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


class TensorRTStore(CacheStore):
    """See the module."""

    def __init__(self, backend: TensorRTBackend, batch: int) -> None:
        model = backend.manifest.model
        self._backend, self._device, self._rows = backend, backend.device, batch
        self._item = ITEM_SIZES[backend.manifest.cache.dtype]
        self._row_shape = (model.num_heads, backend.manifest.max_length, model.head_dim)
        self._buffers = backend.take_buffers(batch)
        self._give_back = weakref.finalize(self, backend.give_back, self._buffers)
        self._give_back.atexit = False  # the system takes everything then
        self.lengths = np.zeros(batch, dtype=np.int64)

    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """See `CacheStore.prefill`."""
        chunk = min(chunk, self._backend.record.options.max_length)
        logits = np.zeros((self.batch, self._backend.manifest.model.vocab_size), np.float32)
        for row, group in self._groups(prompts):
            logits[row : row + len(group)] = self._prefill(row, group, chunk)
        return StepLogits.at_hand(logits)

    def _groups(
        self, prompts: Sequence[NDArray[np.int64]]
    ) -> list[tuple[int, list[NDArray[np.int64]]]]:
        """Prompts that are computed together, each group behind the row where it begins."""
        rows = [row for row, prompt in enumerate(prompts) if len(prompt)]
        longest = max(len(prompt) for prompt in prompts)
        if (self.lengths[rows] + longest > self._backend.manifest.max_length).any():
            # A padded row would write behind the end of its cache: rows go alone, unpadded.
            return [(row, [prompts[row]]) for row in rows]
        groups: list[tuple[int, list[NDArray[np.int64]]]] = []
        for row in rows:
            if groups and groups[-1][0] + len(groups[-1][1]) == row:
                groups[-1][1].append(prompts[row])
            else:
                groups.append((row, [prompts[row]]))
        return groups

    def _prefill(
        self, first: int, prompts: Sequence[NDArray[np.int64]], chunk: int
    ) -> NDArray[np.float32]:
        """Logits of the last position of the rows from `first` on, float32 [rows, vocab]."""
        counts = np.array([len(prompt) for prompt in prompts])
        logits = np.empty((len(prompts), self._backend.manifest.model.vocab_size), np.float32)
        for start in range(0, int(counts.max()), chunk):
            left = np.clip(counts - start, 0, chunk)
            ids = np.zeros((len(prompts), int(left.max())), dtype=np.int64)
            for row, prompt in enumerate(prompts):
                ids[row, : left[row]] = prompt[start : start + left[row]]
            found = self.run_chunk(ids, np.maximum(left - 1, 0)[:, None], left, first)
            logits[left > 0] = found[left > 0, 0]
        return logits

    def run_chunk(
        self,
        ids: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
        counts: NDArray[np.int64] | None = None,
        first: int = 0,
    ) -> NDArray[np.float32]:
        """Append tokens to some rows, and give logits of some of them.

        Args:
            ids: [rows, sequence], padded on the right.
            logit_positions: [rows, m], indices among the new tokens.
            counts: [rows] tokens that are no padding; None for all.
            first: the store's row that `ids[0]` belongs to.

        Returns:
            float32 [rows, m, vocab].
        """
        backend, rows = self._backend, len(ids)
        counts = np.full(rows, ids.shape[1]) if counts is None else counts
        last = backend.manifest.max_length - 1
        chosen = slice(first, first + rows)
        lacking = backend.record.options.min_length - ids.shape[1]
        if lacking > 0 and int(self.lengths[chosen].max()) + ids.shape[1] + lacking <= last + 1:
            ids = np.pad(ids, ((0, 0), (0, lacking)))
        positions = self.lengths[chosen, None] + np.arange(ids.shape[1])
        # Padding may not run past the table or the cache: it is fed, but never looked at.
        arrays = {
            "input_ids": np.ascontiguousarray(ids),
            "position_ids": np.minimum(positions, last),
            "logit_positions": np.ascontiguousarray(logit_positions),
        }
        shape = (*logit_positions.shape, backend.manifest.model.vocab_size)
        layout = Layout()
        for name, array in arrays.items():
            layout.add(name, np.int64, array.shape, 8)
        layout.add("logits", np.float32, shape, 4)
        logits = np.empty(shape, np.float32)
        with backend.lock:
            block = backend.allocate(layout.size)
            try:
                for name, array in arrays.items():
                    self._device.upload(block + layout.offset(name), array)
                tensors = {n: (a, s) for n, (a, _, s) in layout.tensors(block).items()}
                stride = self._item * int(np.prod(self._row_shape))
                cache = {
                    n: (a + first * stride, (rows, *s[1:]))
                    for n, (a, s) in self._buffers.bound_cache().items()
                }
                backend.queue_prefill(tensors | cache)
                self._device.download(logits, block + layout.offset("logits"))
                self._device.synchronize()
            finally:
                self._device.free(block)
        self.lengths[chosen] += counts
        return logits

    def decode(self, tokens: NDArray[np.int64]) -> StepLogits:
        """See `CacheStore.decode`: all rows, so that the captured step fits."""
        backend, batch = self._backend, self.batch
        ids = np.zeros((2, self._rows), dtype=np.int64)
        ids[0, :batch], ids[1, :batch] = tokens, self.lengths
        logits = np.empty((batch, 1, backend.manifest.model.vocab_size), np.float32)
        step = self._buffers.step
        with backend.lock:
            backend.plan.check_open()
            for index, name in enumerate(("input_ids", "position_ids")):
                self._device.upload(step[name][0], ids[index])
            self._buffers.run()
            self._device.download(logits, step["logits"][0])
            self._device.synchronize()
        self.lengths += 1
        return StepLogits.at_hand(logits[:, 0])

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """See `CacheStore.reorder`."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if len(moved):
            sources = rows[moved]
            heads, length, head_dim = self._row_shape
            with self._backend.lock:
                self._backend.plan.check_open()
                move_rows(
                    self._device,
                    self._backend.allocate,
                    [address for address, _ in self._buffers.cache.values()],
                    (heads, length, head_dim * self._item),
                    int(self.lengths[sources].max()),
                    sources.tolist(),
                    moved.tolist(),
                )
        self.lengths = self.lengths[rows]

    def extend(self, count: int) -> None:
        """See `CacheStore.extend`: with zeros, as `StepBuffers.clear` says why."""
        stride = self._item * math.prod(self._row_shape)
        with self._backend.lock:
            self._backend.plan.check_open()
            for address, _ in self._buffers.cache.values():
                self._device.zero(address + self.batch * stride, count * stride)
        self.lengths = with_empty_rows(self.lengths, count)

    def fill(self, row: int, source: CacheStore) -> None:
        """See `CacheStore.fill`."""
        assert isinstance(source, TensorRTStore)
        heads, length, head_dim = self._row_shape
        own, other, used = self._buffers.cache, source._buffers.cache, int(source.lengths[0])
        pitch = length * head_dim * self._item
        with self._backend.lock:
            self._backend.plan.check_open()
            fill_row(
                self._device,
                [(own[name][0] + row * heads * pitch, other[name][0]) for name in own],
                heads,
                used,
                (pitch, pitch),
                head_dim * self._item,
            )
            self._device.synchronize()
        self.lengths[row] = used

    def close(self) -> None:
        """See `CacheStore.close`."""
        self._give_back()
