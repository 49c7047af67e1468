"""What the runtime needs of an engine: sessions over a bundle, and caches in its memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.bundle.manifest import Manifest

__all__ = [
    "ITEM_SIZES",
    "Backend",
    "BlockPool",
    "CacheStore",
    "layer_lengths",
    "position_bytes",
    "score_in_chunks",
    "spoil_views",
    "with_empty_rows",
]


ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
"""Bytes of one number of a cache, by `CacheSpec.dtype`."""


def spoil_views(arrays: Iterable[NDArray[np.generic]]) -> None:
    """`CacheStore.spoil` where `contents` gives views: NaN, −1 in int8."""
    for array in arrays:
        array[...] = np.nan if array.dtype.kind == "f" else -1


class BlockPool(ABC):
    """Memory beside the caches, in slots: keys and values of `block_size` positions in each.

    For what sequences have in common (`neo_runtime.cache.prefix_cache`). What a slot holds does not
    depend on the cache that it came from.
    """

    block_size: int

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""


class CacheStore(ABC):
    """Keys and values of the sequences of one request, and the bindings over them.

    A store belongs to one thread at a time. Rows are the sequences of the batch; row `b` holds
    `lengths[b]` positions. The caller has checked token ids and lengths.
    """

    lengths: NDArray[np.int64]
    """[batch] positions that each row holds."""
    local_slots: int | None = None
    """Slots of a row in a local layer, where the graph evicts from it; None: it holds all."""

    @property
    def batch(self) -> int:
        """Rows in use; `reorder` and `extend` change it."""
        return len(self.lengths)

    @abstractmethod
    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """Append the tokens of `prompts[b]` to row `b`.

        Args:
            prompts: one int64 array [n_b] a row; rows with none stay as they are.
            chunk: most tokens of a row that go through the graph in one call; where first prompts
                of several rows go together, of all of them, padding included.

        Returns:
            Logits of each row's last position, valid until the next call; of rows without new
            tokens they mean nothing.
        """

    @abstractmethod
    def decode(self, tokens: NDArray[np.int64]) -> StepLogits:
        """Append one token to every row.

        Args:
            tokens: int64 [batch].

        Returns:
            Logits, valid until the next call.
        """

    @abstractmethod
    def score(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Append tokens to the only row, and write the logits at each.

        Args:
            ids: int64 [n], n at most `Backend.scored_at_once`.
            logits: float32 [n, vocab], contiguous.
        """

    @abstractmethod
    def crop(self, lengths: NDArray[np.int64]) -> None:
        """Keep the first `lengths[b]` positions of row `b`.

        Args:
            lengths: int64 [batch]; `evicted` says the same of them and of the rows' own.
        """

    @abstractmethod
    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make row `i` what row `rows[i]` was; rows may be dropped, permuted and repeated.

        Args:
            rows: int64 [n], n at most the batch that the store was made for, 0 as well.
        """

    @abstractmethod
    def extend(self, count: int) -> None:
        """Add `count` empty rows behind those in use.

        Args:
            count: at least 1; the store was made for so many rows in all.
        """

    @abstractmethod
    def fill(self, rows: NDArray[np.int64], source: CacheStore) -> None:
        """Make empty rows what row 0 of another store is.

        Args:
            rows: of this store, int64 [n].
            source: of the same engine; its row fits into this one.
        """

    def evicted(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions, the first ones, that local layers no longer hold of sequences: int64 [n].

        Args:
            lengths: positions of each sequence, int64 [n].
        """
        return np.zeros_like(lengths)

    @abstractmethod
    def save_block(self, row: int, start: int, pool: BlockPool, slot: int) -> None:
        """Copy a row's positions from `start` on, `pool.block_size` of them, into a slot.

        Args:
            row: of this store.
            start: at least what is `evicted`.
            pool: of the same engine.
            slot: what it held is lost.
        """

    @abstractmethod
    def load_blocks(self, row: int, pool: BlockPool, slots: Sequence[int]) -> None:
        """Make an empty row what slots of a pool hold, one behind the other.

        Args:
            row: of this store, with room for all of it.
            pool: of the same engine.
            slots: at least one.
        """

    def contents(self) -> list[NDArray[np.generic]]:
        """What the cache holds now, as it lies: layer by layer, keys first.

        Returns:
            [batch, heads, slots, head_dim] each, views, or copies of what is on a device (bfloat16
            as float32). Positions are contiguous; slots behind them are of no meaning. For tools
            that look into a cache.

        Raises:
            NotImplementedError: this engine keeps its cache where it cannot be seen.
        """
        raise NotImplementedError

    def spoil(self) -> None:
        """Fill a cache that is still empty with what no sequence leaves there.

        For tools: memory is used again, and what an earlier text left in a slot could be right.

        Raises:
            NotImplementedError: as `contents`.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Give the memory back, or leave it to the next store; this one cannot be used any more."""


class Backend(ABC):
    """The graphs of one bundle, loaded by one engine; several threads may use it at once."""

    manifest: Manifest
    described: str = ""
    """What it runs on, for a line to the user."""
    default_chunk: int = 512
    """Tokens of a prompt that go through the graph at once: bounds the memory for activations."""

    scored_at_once: int = 512
    """Positions whose logits one call behind a cache computes: 100 MB with GPT-2's vocabulary."""

    default_batch: int = 16
    """Sequences that are computed together: more are hardly faster, and take more memory."""

    def prepare(self, graphs: Sequence[str] = ("prefill", "decode")) -> None:
        """Load graphs now, instead of with the first request that needs them."""
        return

    @property
    def prepacked_bytes(self) -> int:
        """Bytes of prepacked weights that are kept on disk for this bundle."""
        return 0

    @abstractmethod
    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of keys and values that `open_cache` allocates for these arguments."""

    @abstractmethod
    def open_cache(self, batch: int, length: int) -> CacheStore:
        """Allocate a store of `batch` rows of up to `length` positions, all empty."""

    @abstractmethod
    def open_pool(self, slots: int, block_size: int) -> BlockPool:
        """Allocate a pool of `slots` slots of `block_size` positions: `position_bytes` each.

        Raises:
            DeviceMemoryError: there is no room on the device.
            MemoryError: nor in the system.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the sessions; calls that are running finish first."""


def score_in_chunks(
    store: CacheStore, ids: NDArray[np.int64], vocab_size: int, chunk: int
) -> NDArray[np.float32]:
    """Append tokens, int64 [n], to the only row, `chunk` at once; logits float32 [n, vocab]."""
    logits: NDArray[np.float32] = np.empty((len(ids), vocab_size), np.float32)
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        store.score(ids[part], logits[part])
    return logits


def with_empty_rows(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`CacheStore.lengths` with `count` empty rows behind the others."""
    return np.concatenate([lengths, np.zeros(count, np.int64)])


def layer_lengths(manifest: Manifest, length: int) -> list[int]:
    """Positions that the cache tensors of each layer hold, for sequences of up to `length`.

    A local layer whose graph evicts what has left the window needs no more than the window, and
    no less however short the sequences are. A quarter more spares most of the work of eviction:
    the graph moves what it keeps to the front only when the buffer is full.
    """
    window = manifest.cache.window
    if window is None:
        return [length] * manifest.model.num_layers
    local = max(window, min(length, window + window // 4))
    return [local if kind == "local" else length for kind in manifest.model.attention_layers]


def position_bytes(manifest: Manifest) -> int:
    """Bytes of the keys and values of one position in all layers."""
    model = manifest.model
    numbers = 2 * model.num_layers * model.num_heads * model.head_dim
    return numbers * ITEM_SIZES[manifest.cache.dtype]
