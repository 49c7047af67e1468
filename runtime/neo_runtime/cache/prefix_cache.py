"""Prefix cache: keys and values of earlier requests, reused by requests that begin alike."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

from neo_runtime.backends.base import position_bytes
from neo_runtime.cache.prefix_tree import PrefixTree
from neo_runtime.closable import Closable
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.backends.base import Backend
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cache.ledger import CacheLedger
    from neo_runtime.cache.prefix_tree import Block

__all__ = ["CachedBeginning", "PrefixCache"]

_MAX_BLOCK_SIZE = 32
"""Positions; a block is smaller if fewer are computed at once."""


class PrefixCache(Closable):
    """Blocks of tokens with their keys and values in all layers. One thread at a time.

    Another text may continue after any block, so a block holds its positions in all layers. Local
    layers of a KV cache hold little more than a window, so blocks must be copied before these
    layers evict them: prompts must be computed at most `chunk` tokens at a time.
    """

    def __init__(self, backend: Backend, ledger: CacheLedger, size: int, chunk: int) -> None:
        """Allocate the memory.

        Args:
            backend: the backend whose KV caches are copied from and to.
            ledger: counts the memory until `close`.
            size: most bytes.
            chunk: most prompt tokens that the model computes at once.

        Raises:
            RequestError: the size is less than that of one block.
            CacheLimitError: the ledger, the device or the system has no room.
        """
        at_once = min(chunk, backend.manifest.cache.window or chunk)
        self.block_size = min(_MAX_BLOCK_SIZE, at_once)
        """Positions of a block."""
        self.chunk = at_once // self.block_size * self.block_size
        """Most prompt tokens that may be computed at once."""
        self.queries = self.hits = 0
        """Prompt tokens looked up, and those found."""
        block = self.block_size * position_bytes(backend.manifest)
        if size < block:
            raise RequestError(
                f"prefix_cache_bytes is {size}, expected at least {block}: what a block of "
                f"{self.block_size} tokens takes"
            )
        slots = size // block
        self.nbytes = slots * block
        """Bytes of keys and values."""
        self._pool, release = ledger.allocate(
            self.nbytes,
            "the prefix cache",
            partial(backend.open_pool, slots, self.block_size),
            "ask for a smaller one (prefix_cache_bytes)",
        )
        self._release = weakref.finalize(self, release)
        self._release.atexit = False
        self._tree = PrefixTree(slots)

    def find(self, ids: NDArray[np.int64]) -> CachedBeginning:
        """Look up a prompt, int64 [n].

        The last token is never taken from the cache: it must be computed for its logits.
        """
        whole = (len(ids) - 1) // self.block_size
        found = self._tree.find([self.key(ids, index) for index in range(whole)])
        return CachedBeginning(self, ids, found, found[-1] if found else self._tree.root)

    def key(self, ids: NDArray[np.int64], index: int) -> bytes:
        """The key of block `index` of a text, int64 [n]."""
        return ids[index * self.block_size : (index + 1) * self.block_size].tobytes()

    def load(self, blocks: list[Block], cache: KVCache, row: int) -> None:
        """Copy consecutive blocks to an empty row of a KV cache."""
        assert all(block.is_kept for block in blocks), "they are read right after they were found"
        if blocks:
            with cache.changing() as store:
                store.load_blocks(row, self._pool, [block.slot for block in blocks])

    def save(
        self, parent: Block, index: int, ids: NDArray[np.int64], cache: KVCache, row: int
    ) -> Block | None:
        """Store block `index` of a text as a child of the block before it.

        Args:
            parent: the block before.
            index: index of the block in the text.
            ids: the tokens of the text, int64 [n], including those of the block.
            cache: the KV cache to copy from.
            row: row of the text in that cache.

        Returns:
            The block; None if it cannot be stored.
        """
        tokens, start = self.key(ids, index), index * self.block_size
        if not parent.is_kept:
            return None
        if tokens in parent.children:
            return parent.children[tokens]
        with cache.reading() as store:
            if start < store.evicted(store.lengths)[row]:
                return None
            block = self._tree.add(parent, tokens)
            if block is not None:
                try:
                    store.save_block(row, start, self._pool, block.slot)
                except BaseException:
                    self._tree.remove(block)
                    raise
        return block

    def close(self) -> None:
        """Free the memory."""
        self._pool.close()
        self._release()


class CachedBeginning:
    """The blocks of one text in the prefix cache; more are added as the text is computed."""

    def __init__(
        self, cache: PrefixCache, prompt: NDArray[np.int64], found: list[Block], last: Block
    ) -> None:
        """Hold the blocks that were found.

        Args:
            cache: the prefix cache.
            prompt: the tokens of the prompt, int64 [n].
            found: the cached blocks, from the first on.
            last: the last of them, or the root of the tree.
        """
        self._cache, self._prompt, self._found = cache, prompt, found
        self._last: Block | None = last
        """None if the next block of the text cannot be stored, and therefore no later one."""
        self._count = len(found)

    @property
    def length(self) -> int:
        """Number of tokens that were found."""
        return len(self._found) * self._cache.block_size

    @property
    def ahead(self) -> tuple[Block, bytes] | None:
        """Parent and key of the block that this prompt stores next.

        None if no block can be stored, or if the block would contain the prompt's last token, which
        is never taken from the cache.
        """
        if self._last is None or (self._count + 1) * self._cache.block_size >= len(self._prompt):
            return None
        return self._last, self._cache.key(self._prompt, self._count)

    def load(self, cache: KVCache, row: int) -> None:
        """Copy what was found to an empty row. Must directly follow `PrefixCache.find`."""
        self._cache.load(self._found, cache, row)
        self._cache.queries += len(self._prompt)
        self._cache.hits += self.length

    def has_more(self, length: int) -> bool:
        """Whether a text of `length` tokens has whole blocks that are not stored yet."""
        return self._last is not None and length // self._cache.block_size > self._count

    def extend(self, ids: NDArray[np.int64], cache: KVCache, row: int) -> None:
        """Store the whole blocks of a text, int64 [n], that a row of a KV cache holds."""
        last, whole = self._last, len(ids) // self._cache.block_size
        self._last = None  # for good, if a copy fails
        while last is not None and self._count < whole:
            last = self._cache.save(last, self._count, ids, cache, row)
            self._count += 1
        self._last = last
