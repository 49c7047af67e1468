"""Cache layout `append`: the graph returns a new, longer cache in the other of two buffer sets.

    rows are padded on the left, so that all end at the same column

    row 0   k k k k k k              lengths[0] = 6, width = 6
    row 1   . . . k k k              lengths[1] = 3: the three columns of padding are masked

Each call reads one set as past and writes the other as present. Keys and values are not allocated
per step, at the price of twice the memory. For graphs that cannot update a cache in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import CacheStore, spoil_views, with_empty_rows
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.backends.cpu.blocks import HostBlocks
from neo_runtime.backends.cpu.cache_memory import aligned_zeros
from neo_runtime.backends.step_logits import StepLogits

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.base import BlockPool
    from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend

__all__ = ["AppendStore"]


class AppendStore(CacheStore):
    """A `CacheStore` in layout `append`."""

    def __init__(self, backend: OnnxRuntimeBackend, batch: int, length: int) -> None:
        model = backend.manifest.model
        self._backend = backend
        self._heads, self._head_dim = model.num_heads, model.head_dim
        size = batch * model.num_heads * length * model.head_dim
        flat = [(size,)] * (2 * model.num_layers)
        self._past = aligned_zeros(flat, backend.manifest.cache.dtype)
        self._present = aligned_zeros(flat, backend.manifest.cache.dtype)
        self._logits = np.zeros((batch, 1, model.vocab_size), dtype=np.float32)
        self._width = 0
        self.lengths = np.zeros(batch, dtype=np.int64)

    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """See `CacheStore.prefill`."""
        with self._backend.prompt():
            return self._prefill(prompts, chunk)

    def _prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        counts = np.array([len(prompt) for prompt in prompts])
        if self._width and (counts != counts[0]).any():
            self._prefill_rows(prompts, counts, chunk)
            return StepLogits.at_hand(self._logits[: self.batch, 0])
        ids = np.zeros((self.batch, counts.max()), dtype=np.int64)
        for padded, prompt in zip(ids, prompts, strict=True):
            padded[len(padded) - len(prompt) :] = prompt
        pads = self._width + counts.max() - (self.lengths + counts)
        for start in range(0, ids.shape[1], chunk):
            self._advance("prefill", np.ascontiguousarray(ids[:, start : start + chunk]), pads)
        self.lengths += counts
        return StepLogits.at_hand(self._logits[: self.batch, 0])

    def score(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """See `CacheStore.score`."""
        pads = self._width - self.lengths
        with self._backend.prompt():
            self._advance("score", np.ascontiguousarray(ids)[None], pads, logits[None])
        self.lengths += len(ids)

    def crop(self, lengths: NDArray[np.int64]) -> None:
        """See `CacheStore.crop`. Rows are moved so that all end at the same column again."""
        width = int(lengths.max(initial=0))
        before = self._views(self._past, self.batch, self._width)
        after = self._views(self._present, self.batch, width)
        for source, target in zip(before, after, strict=True):
            for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
                first = self._width - old
                target[row, :, : width - new] = 0
                target[row, :, width - new :] = source[row, :, first : first + new]
        self._past, self._present = self._present, self._past
        self._width, self.lengths = width, lengths

    def decode(self, tokens: NDArray[np.int64]) -> StepLogits:
        """See `CacheStore.decode`."""
        ids = np.ascontiguousarray(tokens, dtype=np.int64)[:, None]
        self._advance("decode", ids, self._width - self.lengths)
        self.lengths += 1
        self._backend.after_step(self.batch)
        return StepLogits.at_hand(self._logits[: self.batch, 0])

    def _advance(
        self,
        graph: str,
        ids: NDArray[np.int64],
        pads: NDArray[np.int64],
        logits: NDArray[np.float32] | None = None,
    ) -> None:
        """Run a graph on all rows, and swap the two buffer sets.

        Args:
            graph: "prefill", "decode" or "score".
            ids: int64 [batch, n], padded on the left.
            pads: int64 [batch], columns of padding at the beginning of each row, past included.
            logits: output; None for the store's own buffer.
        """
        width = self._width + ids.shape[1]
        columns = np.arange(width, dtype=np.int64)
        positions = np.maximum(columns[self._width :] - pads[:, None], 0)
        call = BoundCall(
            self._backend,
            graph,
            input_ids=ids,
            attention_mask=(columns >= pads[:, None]).astype(np.int64),
            position_ids=positions,
            past=self._views(self._past, self.batch, self._width),
            present=self._views(self._present, self.batch, width),
            logits=self._logits[: self.batch] if logits is None else logits,
        )
        call.run()
        self._past, self._present = self._present, self._past
        self._width = width

    def _prefill_rows(
        self, prompts: Sequence[NDArray[np.int64]], counts: NDArray[np.int64], chunk: int
    ) -> None:
        """Append different numbers of tokens to rows with a past.

        Padding between a row's past and its new tokens would count as positions of its local
        windows. So each row runs alone and unpadded, in a temporary store, and is copied back to
        end at the new width. Rows without new tokens are only moved.
        """
        lengths = self.lengths + counts
        width = int(lengths.max())
        present = self._views(self._present, self.batch, width)
        past = self._views(self._past, self.batch, self._width)
        moved = width - self._width
        for own, shared in zip(past, present, strict=True):
            shared[:, :, :moved] = 0
            shared[:, :, moved:] = own
        for row in np.flatnonzero(counts).tolist():
            prompt, used = prompts[row], int(self.lengths[row])
            single = AppendStore(self._backend, 1, used + len(prompt))
            for own, shared in zip(single._views(single._past, 1, used), past, strict=True):
                own[0] = shared[row, :, self._width - used :]
            single._width = used
            single.lengths[0] = used
            self._logits[row, 0] = single._prefill([prompt], chunk).full()[0]
            pad = width - len(prompt) - used
            views = single._views(single._past, 1, used + len(prompt))
            for own, shared in zip(views, present, strict=True):
                shared[row, :, :pad] = 0
                shared[row, :, pad:] = own[0]
        self._past, self._present = self._present, self._past
        self._width, self.lengths = width, lengths

    def _views(self, buffers: Sequence[NDArray[Any]], batch: int, width: int) -> list[NDArray[Any]]:
        """The beginning of each buffer as [batch, heads, width, head_dim]."""
        shape = (batch, self._heads, width, self._head_dim)
        size = batch * self._heads * width * self._head_dim
        return [buffer[:size].reshape(shape) for buffer in buffers]

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """See `CacheStore.reorder`."""
        lengths = self.lengths[rows]
        # Columns that are padding in every kept row are dropped. So the width is always that of
        # the longest row, and no row can outgrow the buffers.
        width = int(lengths.max(initial=0))
        before = self._views(self._past, self.batch, self._width)
        after = self._views(self._present, len(rows), width)
        for source, target in zip(before, after, strict=True):
            for index, row in enumerate(rows):
                target[index] = source[row, :, self._width - width :]
        self._past, self._present = self._present, self._past
        self._width, self.lengths = width, lengths

    def extend(self, count: int) -> None:
        """See `CacheStore.extend`."""
        batch = self.batch
        self.lengths = with_empty_rows(self.lengths, count)
        for buffer in self._views(self._past, self.batch, self._width):
            buffer[batch:] = 0  # masked values are still multiplied by 0, so they must be finite

    def fill(self, rows: NDArray[np.int64], source: CacheStore) -> None:
        """See `CacheStore.fill`."""
        assert isinstance(source, AppendStore)
        used = int(source.lengths[0])
        self._fill(rows, used, source._views(source._past, 1, used))

    def save_block(self, row: int, start: int, pool: BlockPool, slot: int) -> None:
        """See `CacheStore.save_block`."""
        assert isinstance(pool, HostBlocks)
        first = self._width - int(self.lengths[row]) + start
        held = self._views(self._past, self.batch, self._width)
        for block, tensor in zip(pool.arrays[slot], held, strict=True):
            block[:] = tensor[row, :, first : first + pool.block_size]

    def load_blocks(self, row: int, pool: BlockPool, slots: Sequence[int]) -> None:
        """See `CacheStore.load_blocks`."""
        assert isinstance(pool, HostBlocks)
        tensors = range(pool.arrays.shape[1])
        joined = (np.concatenate([pool.arrays[s, t] for s in slots], axis=1) for t in tensors)
        self._fill(np.array([row]), len(slots) * pool.block_size, joined)

    def _fill(self, rows: NDArray[np.int64], used: int, sources: Iterable[NDArray[Any]]) -> None:
        """Copy `used` positions into empty rows, and move the other rows to end at the same column.

        Args:
            rows: int64 [n].
            used: number of positions.
            sources: one [heads, used, head_dim] per cache tensor, or [1, heads, used, head_dim].
        """
        width = max(self._width, used)
        before = self._views(self._past, self.batch, self._width)
        after = self._views(self._present, self.batch, width)
        for past, present, filled in zip(before, after, sources, strict=True):
            present[:, :, : width - self._width] = 0
            present[:, :, width - self._width :] = past
            present[rows, :, width - used :] = filled
        self._past, self._present = self._present, self._past
        self._width, self.lengths[rows] = width, used

    def contents(self) -> list[NDArray[Any]]:
        """See `CacheStore.contents`."""
        return self._views(self._past, self.batch, self._width)

    def spoil(self) -> None:
        """See `CacheStore.spoil`."""
        spoil_views(self.contents())

    def close(self) -> None:
        """See `CacheStore.close`."""
        self._past, self._present = [], []
