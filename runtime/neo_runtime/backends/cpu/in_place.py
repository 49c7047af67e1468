"""Cache layout `in_place`: one buffer per cache tensor, read as past and written as present.

    buffer of a layer's keys, [batch, heads, length, head_dim]

    row 0   k k k k k k . . . .      lengths[0] = 6: the next token is written at position 6
    row 1   k k k . . . . . . .      lengths[1] = 3

Rows are contiguous in memory, so neighbouring rows can be bound as a smaller batch.

If `CacheSpec.window` is set, a local layer's buffer holds little more than the window. When it is
full, the graph moves the last positions to its front and evicts the others.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import CacheStore, layer_lengths, spoil_views, with_empty_rows
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.backends.cpu.blocks import HostBlocks
from neo_runtime.backends.cpu.cache_memory import aligned_arrays, aligned_size
from neo_runtime.backends.cpu.staged_cache import StagedCache
from neo_runtime.backends.right_padded import RightPaddedStore
from neo_runtime.backends.step_logits import CandidateRows, StepLogits
from neo_runtime.bundle.manifest import CANDIDATE_OUTPUTS
from neo_runtime.closable import of_open_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.base import BlockPool
    from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["InPlaceStore"]


class InPlaceStore(RightPaddedStore):
    """A `CacheStore` in layout `in_place`."""

    def __init__(self, backend: OnnxRuntimeBackend, batch: int, length: int) -> None:
        model = backend.manifest.model
        slots = layer_lengths(backend.manifest, length)
        shapes = [
            (batch, model.num_heads, positions, model.head_dim)
            for positions in slots
            for _ in ("key", "value")
        ]
        self._backend = backend
        self._length = length
        # The prefill graph converts the whole buffers of an int8 cache to float32: `StagedCache`.
        self._widens = backend.manifest.cache.dtype == "int8"
        evicts = backend.manifest.cache.window is not None
        self.local_slots = min(slots) if min(slots) < length else None
        self._growing = [
            not (evicts and kind == "local") for kind in model.attention_layers for _ in range(2)
        ]
        dtype = backend.manifest.cache.dtype
        block = backend.kept_block.take(aligned_size(shapes, dtype))
        self._buffers = aligned_arrays(block, shapes, dtype)
        self._block: NDArray[np.uint8] | None = block
        self._busy = threading.Lock()
        """Held while a call reads or writes the memory."""
        self._logits = np.zeros((batch, 1, model.vocab_size), dtype=np.float32)
        self._candidates = _candidate_arrays(backend.manifest, batch)
        self._ids = np.zeros((batch, 1), dtype=np.int64)
        self._positions = np.zeros((batch, 1), dtype=np.int64)
        self._mask = np.zeros((batch, length), dtype=np.int64)
        self._decode: BoundCall | None = None
        self.lengths = np.zeros(batch, dtype=np.int64)

    def _run_prefill(
        self,
        row: int,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        self._run("prefill", row, ids, mask, positions)

    def _run(
        self,
        graph: str,
        row: int,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        logits: NDArray[np.float32] | None = None,
    ) -> None:
        """Run a graph on `len(ids)` rows from `row` on.

        Args:
            graph: "prefill" or "score".
            row: first row.
            ids: int64 [rows, n].
            mask: int64 [rows, past + n].
            positions: int64 [rows, n].
            logits: output; None for the rows' own buffer.
        """
        with self._busy:
            cache, total = self._rows(row, len(ids)), mask.shape[1]
            if not self._widens or 2 * total > self._length:
                self._call(graph, row, ids, mask, positions, cache, cache, logits).run()
                return
            past = int(self.lengths[row])  # the same for all rows: there is one, or all are empty
            staged = StagedCache(cache, self._growing, past, total)
            before, after = staged.past, staged.present
            self._call(graph, row, ids, mask, positions, before, after, logits).run()
            staged.store()

    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """See `CacheStore.prefill`."""
        with self._backend.prompt():
            return super().prefill(prompts, chunk)

    def score(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """See `CacheStore.score`."""
        with self._backend.prompt():
            self._run("score", 0, *self._behind(0, ids), logits[None])
        self.lengths[0] += len(ids)
        self._refresh_mask()

    def crop(self, lengths: NDArray[np.int64]) -> None:
        """See `CacheStore.crop`."""
        self.lengths = lengths
        self._refresh_mask()

    def _after_prefill(self) -> StepLogits:
        self._refresh_mask()
        return self._step()

    def _rows(self, row: int, count: int) -> list[NDArray[Any]]:
        """`count` rows of every buffer, from `row` on."""
        of_open_cache(self._block)
        return [buffer[row : row + count] for buffer in self._buffers]

    def _call(
        self,
        graph: str,
        row: int,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        past: Sequence[NDArray[Any]],
        present: Sequence[NDArray[Any]],
        logits: NDArray[np.float32] | None = None,
    ) -> BoundCall:
        """Bind `len(ids)` rows from `row` on."""
        rows = slice(row, row + len(ids))
        candidates = {} if graph == "score" else self._candidates
        return BoundCall(
            self._backend,
            graph,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past=past,
            present=present,
            logits=self._logits[rows] if logits is None else logits,
            candidates={name: array[rows] for name, array in candidates.items()},
        )

    def _step(self) -> StepLogits:
        """The logits that the last call wrote."""
        batch, found, rows = self.batch, self._candidates, None
        if found:
            rows = CandidateRows(*(found[name][:batch, 0] for name in CANDIDATE_OUTPUTS))
        return StepLogits.at_hand(self._logits[:batch, 0], rows)

    def decode(self, tokens: NDArray[np.int64]) -> StepLogits:
        """See `CacheStore.decode`."""
        batch = self.batch
        with self._busy:
            if self._decode is None:
                cache = self._rows(0, batch)
                ids, mask, positions = (x[:batch] for x in (self._ids, self._mask, self._positions))
                self._decode = self._call("decode", 0, ids, mask, positions, cache, cache)
            self._ids[:batch, 0] = tokens
            self._positions[:batch, 0] = self.lengths
            self._mask[np.arange(batch), self.lengths] = 1
            self._decode.run()
        self.lengths += 1
        self._backend.after_step(batch)
        return self._step()

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """See `CacheStore.reorder`."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if len(moved):
            sources = rows[moved]
            used = int(self.lengths[sources].max())
            with self._busy:
                for buffer in self._buffers:
                    # Indexing copies the sources first, so rows may trade places.
                    buffer[moved, :, :used] = buffer[sources, :, :used]
        if len(rows) != self.batch:
            self._decode = None
        self.lengths = self.lengths[rows]
        self._refresh_mask()

    def extend(self, count: int) -> None:
        """See `CacheStore.extend`."""
        self._decode = None
        self.lengths = with_empty_rows(self.lengths, count)
        self._refresh_mask()

    def fill(self, rows: NDArray[np.int64], source: CacheStore) -> None:
        """See `CacheStore.fill`.

        Once a local layer has evicted, where its positions lie depends on the buffer's size. So
        either the source has not evicted yet, or both buffers have the same size; `layer_lengths`
        ensures that.
        """
        assert isinstance(source, InPlaceStore)
        used = int(source.lengths[0])
        with self._busy:
            for own, other in zip(self._buffers, source._rows(0, 1), strict=True):
                held = min(used, other.shape[2])
                assert held == used or other.shape[2] == own.shape[2]
                for row in rows:
                    own[row, :, :held] = other[0, :, :held]
        self.lengths[rows] = used
        self._refresh_mask()

    def evicted(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `CacheStore.evicted`.

        onnxruntime's GroupQueryAttention (`sliding_window_cache`) does not record it, but it
        follows from the length. A new position that finds the buffer full moves the newest
        positions to the front, so that together with it the buffer holds exactly one window.
        """
        slots, window = self.local_slots, self._backend.manifest.cache.window
        if slots is None or window is None:
            return super().evicted(lengths)
        since_full = (lengths - slots - 1) % (slots - window + 1)
        return np.where(lengths <= slots, 0, lengths - window - since_full)

    def save_block(self, row: int, start: int, pool: BlockPool, slot: int) -> None:
        """See `CacheStore.save_block`."""
        assert isinstance(pool, HostBlocks)
        evicted = int(self.evicted(self.lengths)[row])
        assert start >= evicted
        with self._busy:
            for growing, buffer, block in zip(
                self._growing, self._buffers, pool.arrays[slot], strict=True
            ):
                first = start if growing else start - evicted
                block[:] = buffer[row, :, first : first + pool.block_size]

    def load_blocks(self, row: int, pool: BlockPool, slots: Sequence[int]) -> None:
        """See `CacheStore.load_blocks`."""
        assert isinstance(pool, HostBlocks)
        used = len(slots) * pool.block_size
        evicted = int(self.evicted(np.array([used]))[0])
        with self._busy:
            for index, slot in enumerate(slots):
                start = index * pool.block_size
                for growing, buffer, block in zip(
                    self._growing, self._buffers, pool.arrays[slot], strict=True
                ):
                    first = start if growing else start - evicted
                    kept = block[:, max(-first, 0) :]
                    first = max(first, 0)
                    buffer[row, :, first : first + kept.shape[1]] = kept
        self.lengths[row] = used
        self._refresh_mask()

    def _refresh_mask(self) -> None:
        columns = np.arange(self._length)
        self._mask[: self.batch] = columns < self.lengths[:, None]

    def contents(self) -> list[NDArray[Any]]:
        """See `CacheStore.contents`."""
        return [buffer[: self.batch] for buffer in self._buffers]

    def spoil(self) -> None:
        """See `CacheStore.spoil`."""
        spoil_views(self.contents())

    def close(self) -> None:
        """See `CacheStore.close`."""
        idle = self._busy.acquire(blocking=False)
        block, self._block = self._block, None
        self._decode = None
        self._buffers = []
        if idle:
            # Otherwise another thread, against the contract, still computes in the memory, which
            # must then not be given to another cache.
            self._busy.release()
            if block is not None:
                self._backend.kept_block.keep(block)


def _candidate_arrays(manifest: Manifest, batch: int) -> dict[str, NDArray[Any]]:
    """A buffer for each of `CANDIDATE_OUTPUTS` that the decode graph has."""
    outputs = {tensor.name: tensor for tensor in manifest.graphs["decode"].outputs}
    return {
        name: np.zeros((batch, *map(int, outputs[name].shape[1:])), dtype=outputs[name].dtype)
        for name in CANDIDATE_OUTPUTS
        if name in outputs
    }
