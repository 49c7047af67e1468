"""The KV cache of a batch in device memory, for a TensorRT plan."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from neo_runtime.backends.base import ITEM_SIZES
from neo_runtime.backends.device.base import Layout
from neo_runtime.backends.device.rows import CacheTensors, DeviceRowsStore
from neo_runtime.backends.step_logits import StepLogits
from neo_runtime.closable import of_open_cache

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.device.base import Device
    from neo_runtime.backends.tensorrt.buffers import StepBuffers
    from neo_runtime.backends.tensorrt.plan import LoadedPlan, Tensors
    from neo_runtime.bundle.engine_record import EngineRecord
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["TensorRTStore"]


class PlanSteps(Protocol):
    """What the store needs of its backend; see `TensorRTBackend`."""

    manifest: Manifest
    device: Device
    lock: threading.Lock
    record: EngineRecord
    plan: LoadedPlan

    def take_buffers(self, batch: int) -> StepBuffers:
        """Buffers for a batch, set to zero."""

    def give_back(self, buffers: StepBuffers) -> None:
        """Return buffers that are no longer in use."""

    def allocate(self, size: int) -> int:
        """Allocate device memory."""

    def queue_prefill(self, tensors: Tensors) -> None:
        """Queue one chunk in the plan's prefill profile."""


class TensorRTStore(DeviceRowsStore):
    """A `CacheStore` for a TensorRT plan."""

    def __init__(self, backend: PlanSteps, batch: int) -> None:
        model = backend.manifest.model
        self._backend, self._device, self._rows = backend, backend.device, batch
        self._item = ITEM_SIZES[backend.manifest.cache.dtype]
        self._row_shape = (model.num_heads, backend.manifest.max_length, model.head_dim)
        self._taken: StepBuffers | None = backend.take_buffers(batch)
        self._give_back = weakref.finalize(self, backend.give_back, self._taken)
        self._give_back.atexit = False  # the system frees everything when the process ends
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
        """Prompts of adjacent rows that are prefilled together, each group with its first row."""
        rows = [row for row, prompt in enumerate(prompts) if len(prompt)]
        longest = max(len(prompt) for prompt in prompts)
        if (self.lengths[rows] + longest > self._backend.manifest.max_length).any():
            # A padded row would write beyond the end of its cache, so rows run alone, unpadded.
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
        """Prefill `len(prompts)` rows from `first` on in chunks.

        Returns:
            Logits of the last position of each row, float32 [rows, vocab].
        """
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
        """Append tokens to some rows, and compute the logits at some of them.

        Args:
            ids: int64 [rows, n], padded on the right.
            logit_positions: int64 [rows, m], indices from 0 among the new tokens.
            counts: int64 [rows], tokens without padding; None if there is none.
            first: the store's row for `ids[0]`.

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
        # Clip the positions of padding to the position table and the cache: it is computed, but
        # its results are never used.
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
        """See `CacheStore.decode`. Computes all rows: the captured step has fixed shapes."""
        backend, batch = self._backend, self.batch
        ids = np.zeros((2, self._rows), dtype=np.int64)
        ids[0, :batch], ids[1, :batch] = tokens, self.lengths
        logits = np.empty((batch, 1, backend.manifest.model.vocab_size), np.float32)
        step = self._buffers.step
        with backend.lock:
            backend.plan.check_open()
            for index, name in enumerate(("input_ids", "position_ids")):
                self._device.upload(step[name][0], ids[index])
            self._buffers.run(backend.lock)
            self._device.download(logits, step["logits"][0])
            self._device.synchronize()
        self.lengths += 1
        return StepLogits.at_hand(logits[:, 0])

    def score(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """See `CacheStore.score`."""
        logits[:] = self.run_chunk(ids[None], np.arange(len(ids))[None])[0]

    def crop(self, lengths: NDArray[np.int64]) -> None:
        """See `CacheStore.crop`."""
        self.lengths = lengths

    def _tensors(self) -> CacheTensors:
        heads, length, head_dim = self._row_shape
        addresses = [address for address, _ in self._buffers.cache.values()]
        return CacheTensors(
            self._device, self._backend.allocate, addresses, heads, length, head_dim * self._item
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._backend.lock:
            self._backend.plan.check_open()
            yield
            self._device.synchronize()

    @property
    def _buffers(self) -> StepBuffers:
        """The buffers, which belong to another store after `close`.

        Raises:
            NeoError: the store is closed.
        """
        return of_open_cache(self._taken)

    def close(self) -> None:
        """See `CacheStore.close`."""
        self._give_back()
        self._taken = None
