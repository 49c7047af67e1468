"""Keys and values of some sequences in device memory, for a TensorRT plan, and the decode step.

    cache     [batch, heads, max_length, head_dim] a tensor, zeros at first, past and present in one
    step      input_ids, position_ids, logit_positions [batch, 1], logits [batch, 1, vocab]

The step is queued once as it is, then captured as a CUDA graph over these addresses, and replayed.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import CacheStore
from neo_runtime.backends.device import Layout, move_rows
from neo_runtime.engine_record import DECODE_PROFILE, PREFILL_PROFILE
from neo_runtime.step_logits import StepLogits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.device import Device
    from neo_runtime.backends.tensorrt import TensorRTBackend

__all__ = ["ITEM_SIZES", "TensorRTStore"]

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


class TensorRTStore(CacheStore):
    """See the module."""

    def __init__(self, backend: TensorRTBackend, batch: int) -> None:
        backend.check_open()
        model = backend.manifest.model
        self._backend, self._device, self._rows = backend, backend.device, batch
        self._item = ITEM_SIZES[backend.manifest.cache.dtype]
        self._row_shape = (model.num_heads, backend.manifest.max_length, model.head_dim)
        cache, step = Layout(), Layout()
        for layer in range(model.num_layers):
            for part in ("key", "value"):
                cache.add(f"{layer}.{part}", None, (batch, *self._row_shape), self._item)
        for name in ("input_ids", "position_ids", "logit_positions"):
            step.add(name, np.int64, (batch, 1), 8)
        step.add("logits", np.float32, (batch, 1, model.vocab_size), 4)
        with backend.lock:
            backend.leftovers.clear()
            self._held = _Held(self._device, cache.size, step.size)
        self._give_back = weakref.finalize(self, backend.leftovers.leave, self._held.free)
        self._give_back.atexit = False  # the system takes everything then
        self._cache = cache.tensors(self._held.cache)
        self._step_tensors = step.tensors(self._held.step)
        bound = {n: (a, s) for n, (a, _, s) in self._step_tensors.items()} | self._bound_cache()
        # Holds no store, for what is captured outlives it.
        self._queue_step = partial(backend.queue, DECODE_PROFILE, bound)
        self.lengths = np.zeros(batch, dtype=np.int64)

    def _bound_cache(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        bound = {}
        for name, (address, _, shape) in self._cache.items():
            bound[f"past_key_values.{name}"] = bound[f"present.{name}"] = (address, shape)
        return bound

    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """See `CacheStore.prefill`."""
        chunk = min(chunk, self._backend.record.options.max_length)
        counts = np.array([len(prompt) for prompt in prompts])
        if (self.lengths + counts.max() > self._backend.manifest.max_length).any():
            # A padded row would write behind the end of its cache: rows go alone, unpadded.
            groups = [(row, [prompt]) for row, prompt in enumerate(prompts)]
        else:
            groups = [(0, list(prompts))]
        logits = np.empty((self.batch, self._backend.manifest.model.vocab_size), np.float32)
        for row, group in groups:
            logits[row : row + len(group)] = self._prefill(row, group, chunk)
        return StepLogits.at_hand(logits)

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
            backend.check_open()
            block = self._device.allocate(layout.size)
            try:
                for name, array in arrays.items():
                    self._device.upload(block + layout.offset(name), array)
                tensors = {n: (a, s) for n, (a, _, s) in layout.tensors(block).items()}
                stride = self._item * int(np.prod(self._row_shape))
                cache = {
                    n: (a + first * stride, (rows, *s[1:]))
                    for n, (a, s) in self._bound_cache().items()
                }
                backend.queue(PREFILL_PROFILE, tensors | cache)
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
        with backend.lock:
            backend.check_open()
            for index, name in enumerate(("input_ids", "position_ids")):
                self._device.upload(self._step_tensors[name][0], ids[index])
            if self._held.graph is None:
                self._queue_step()  # once without: kernels are chosen and loaded
                self._device.synchronize()
                self._held.graph = self._device.capture(self._queue_step)
            else:
                self._device.replay(self._held.graph)
            self._device.download(logits, self._step_tensors["logits"][0])
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
                move_rows(
                    self._device,
                    [address for address, _, _ in self._cache.values()],
                    (heads, length, head_dim * self._item),
                    int(self.lengths[sources].max()),
                    sources.tolist(),
                    moved.tolist(),
                )
        self.lengths = self.lengths[rows]

    def close(self) -> None:
        """See `CacheStore.close`."""
        self._give_back()


class _Held:
    """What a store has of the device; it outlives the store until it can be given back."""

    def __init__(self, device: Device, cache_size: int, step_size: int) -> None:
        self._device = device
        self.graph: Any = None
        """The captured step."""
        self.cache = device.allocate(cache_size)
        try:
            self.step = device.allocate(step_size)
        except BaseException:
            device.free(self.cache)
            raise
        # A slot that was never written is masked, and still multiplied by 0.
        device.zero(self.cache, cache_size)
        device.zero(self.step, step_size)

    def free(self) -> None:
        """Give it back; once."""
        if self.graph is not None:
            self._device.discard(self.graph)
        self._device.free(self.step)
        self._device.free(self.cache)
