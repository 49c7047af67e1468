"""The interfaces that an engine implements: a backend with its sessions, and its KV caches."""

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
"""Bytes per element of a cache, by `CacheSpec.dtype`."""


def spoil_views(arrays: Iterable[NDArray[np.generic]]) -> None:
    """Implement `CacheStore.spoil` for host caches: fill with NaN, or −1 in int8."""
    for array in arrays:
        array[...] = np.nan if array.dtype.kind == "f" else -1


class BlockPool(ABC):
    """Slots outside the caches, each with the keys and values of `block_size` positions.

    Holds prefixes that sequences share (`neo_runtime.cache.prefix_cache`). A slot can be loaded
    into any cache of the same backend, whatever batch size or length it was saved from.
    """

    block_size: int
    """Positions per slot."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory."""


class CacheStore(ABC):
    """The KV cache of a batch of sequences, and the graph bindings over its buffers.

    Not thread-safe: only one thread may use a store at a time. Row `b` is one sequence and holds
    `lengths[b]` positions. Callers have checked token ids and lengths.
    """

    lengths: NDArray[np.int64]
    """[batch] positions held by each row."""
    local_slots: int | None = None
    """Positions that a local layer's buffers have room for, if they may be fewer than the store's
    length (the graph then evicts old ones); None if local layers hold the whole sequence."""

    @property
    def batch(self) -> int:
        """Number of rows in use; `reorder` and `extend` change it."""
        return len(self.lengths)

    @abstractmethod
    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """Append the tokens of `prompts[b]` to row `b`.

        Args:
            prompts: one int64 array [n_b] per row; rows with n_b = 0 stay as they are.
            chunk: most tokens per call. Where the engine prefills several empty rows in one call,
                the limit may apply to all of them together, padding included.

        Returns:
            Logits of each row's last position, valid until the next call; undefined for rows
            without new tokens.
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
        """Append tokens to the only row, and compute the logits after each.

        Args:
            ids: int64 [n], n at most `Backend.scored_at_once`.
            logits: output, float32 [n, vocab], contiguous.
        """

    @abstractmethod
    def crop(self, lengths: NDArray[np.int64]) -> None:
        """Keep the first `lengths[b]` positions of row `b`.

        Args:
            lengths: int64 [batch]. `evicted` must return the same for them as for the current
                lengths: positions that were evicted cannot be restored.
        """

    @abstractmethod
    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make row `i` a copy of what row `rows[i]` was; rows may be dropped, moved and repeated.

        Args:
            rows: int64 [n], n from 0 to the batch size that the store was opened with.
        """

    @abstractmethod
    def extend(self, count: int) -> None:
        """Add `count` empty rows after those in use.

        Args:
            count: at least 1; `batch + count` is at most the batch size that the store was opened
                with.
        """

    @abstractmethod
    def fill(self, rows: NDArray[np.int64], source: CacheStore) -> None:
        """Copy row 0 of another store into empty rows.

        Args:
            rows: rows of this store, int64 [n].
            source: a store of the same backend, whose row 0 fits into this store's length.
        """

    def evicted(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of the first positions local layers have evicted, by sequence length.

        Args:
            lengths: positions of each sequence, int64 [n].

        Returns:
            int64 [n].
        """
        return np.zeros_like(lengths)

    @abstractmethod
    def save_block(self, row: int, start: int, pool: BlockPool, slot: int) -> None:
        """Copy positions `start` to `start + pool.block_size` of a row into a slot.

        Args:
            row: row of this store.
            start: first position; at least the row's `evicted` positions.
            pool: a pool of the same backend.
            slot: index in the pool; its contents are overwritten.
        """

    @abstractmethod
    def load_blocks(self, row: int, pool: BlockPool, slots: Sequence[int]) -> None:
        """Fill an empty row with the positions in some slots of a pool, in this order.

        Args:
            row: row of this store, with room for `len(slots) * pool.block_size` positions.
            pool: a pool of the same backend.
            slots: indices in the pool, at least one.
        """

    def contents(self) -> list[NDArray[np.generic]]:
        """The cache tensors, layer by layer, keys first; for tools that inspect a cache.

        Returns:
            [batch, heads, positions, head_dim] each: views of host memory, or copies of device
            memory (bfloat16 as float32). A row's positions are contiguous; what lies outside of
            them is undefined.

        Raises:
            NotImplementedError: this engine does not expose its cache.
        """
        raise NotImplementedError

    def spoil(self) -> None:
        """Fill an empty cache with values that no sequence leaves there; for tools.

        Buffers are reused, so a graph that wrongly reads unwritten positions could otherwise find
        the right values of an earlier text there.

        Raises:
            NotImplementedError: this engine does not expose its cache.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Free the memory, or keep it for the next store. The store cannot be used afterwards."""


class Backend(ABC):
    """The graphs of one bundle, loaded by one engine. Thread-safe."""

    manifest: Manifest
    described: str = ""
    """The device that it runs on, for messages to the user."""
    default_chunk: int = 512
    """Default number of prompt tokens per call; it bounds the memory for activations."""

    scored_at_once: int = 512
    """Most positions per call of `CacheStore.score`; 512 take 100 MB of logits with GPT-2's
    vocabulary."""

    default_batch: int = 16
    """Default number of sequences per batch; more take more memory and are hardly faster."""

    def prepare(self, graphs: Sequence[str] = ("prefill", "decode")) -> None:
        """Load graphs now instead of on the first request that needs them.

        Args:
            graphs: any of "prefill", "decode" and "score".
        """
        return

    @property
    def prepacked_bytes(self) -> int:
        """Bytes of prepacked weights on disk for this bundle."""
        return 0

    @abstractmethod
    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of keys and values that `open_cache` allocates for these arguments."""

    @abstractmethod
    def open_cache(self, batch: int, length: int) -> CacheStore:
        """Allocate a store of `batch` empty rows of up to `length` positions each."""

    @abstractmethod
    def open_pool(self, slots: int, block_size: int) -> BlockPool:
        """Allocate `slots` slots of `block_size` positions, `position_bytes` per position.

        Raises:
            DeviceMemoryError: the device has too little free memory.
            MemoryError: the host has too little free memory.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the sessions and, on a device, the weights; running calls finish first."""


def score_in_chunks(
    store: CacheStore, ids: NDArray[np.int64], vocab_size: int, chunk: int
) -> NDArray[np.float32]:
    """Append tokens to the only row of a store, and return the logits after each.

    Args:
        store: has one row.
        ids: int64 [n].
        vocab_size: logits per position.
        chunk: tokens per call, at most `Backend.scored_at_once`.

    Returns:
        float32 [n, vocab].
    """
    logits: NDArray[np.float32] = np.empty((len(ids), vocab_size), np.float32)
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        store.score(ids[part], logits[part])
    return logits


def with_empty_rows(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`CacheStore.lengths` with `count` empty rows appended."""
    return np.concatenate([lengths, np.zeros(count, np.int64)])


def layer_lengths(manifest: Manifest, length: int) -> list[int]:
    """Positions in the cache tensors of each layer, for sequences of up to `length` positions.

    Where the graph evicts positions that have left the window (`CacheSpec.window`), a local layer
    needs at least the window, however short the sequences are. A quarter of the window is added if
    sequences are long enough to use it: the graph moves the positions it keeps to the front only
    when the buffer is full, so a larger buffer means fewer moves.
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
