"""Keys and values of what requests began with, for others that begin alike (prefix caching)."""

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
"""Positions; fewer where less is read at once."""


class PrefixCache(Closable):
    """Blocks of tokens with their keys and values in all layers. One thread at a time.

    Local layers of a cache hold little more than a window, but a text may go on from any block, so
    every block holds its positions in all layers. They are copied while the cache still has them:
    a prompt is to be read at most `chunk` tokens at once.
    """

    def __init__(self, backend: Backend, ledger: CacheLedger, size: int, chunk: int) -> None:
        """Allocate.

        Args:
            backend: whose caches these are copied from and to.
            ledger: counts the memory until `close`.
            size: bytes, at most.
            chunk: tokens of a prompt that the model reads at once.

        Raises:
            RequestError: the size is less than a block's.
            CacheLimitError: the ledger, the device or the system has no room.
        """
        at_once = min(chunk, backend.manifest.cache.window or chunk)
        self.block_size = min(_MAX_BLOCK_SIZE, at_once)
        """Positions of a block."""
        self.chunk = at_once // self.block_size * self.block_size
        """Tokens of a prompt that may be read at once."""
        self.queries = self.hits = 0
        """Tokens of prompts that were begun, and those of them that were here."""
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
        """What is there of a prompt, int64 [n]: never all of it, as its last token gives logits."""
        whole = (len(ids) - 1) // self.block_size
        found = self._tree.find([self.key(ids, index) for index in range(whole)])
        return CachedBeginning(self, ids, found, found[-1] if found else self._tree.root)

    def key(self, ids: NDArray[np.int64], index: int) -> bytes:
        """What block `index` of a text, int64 [n], is known by."""
        return ids[index * self.block_size : (index + 1) * self.block_size].tobytes()

    def load(self, blocks: list[Block], cache: KVCache, row: int) -> None:
        """Make an empty row of a cache what some blocks hold, one behind the other."""
        assert all(block.is_kept for block in blocks), "they are read right after they were found"
        if blocks:
            with cache.changing() as store:
                store.load_blocks(row, self._pool, [block.slot for block in blocks])

    def save(
        self, parent: Block, index: int, ids: NDArray[np.int64], cache: KVCache, row: int
    ) -> Block | None:
        """Keep block `index` of a text behind the one before it.

        Args:
            parent: the one before.
            index: of the block.
            ids: the text's, int64 [n], the block's included.
            cache: has the text.
            row: where.

        Returns:
            The block; None where it cannot be kept.
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
        """Give the memory back."""
        self._pool.close()
        self._release()


class CachedBeginning:
    """What a prefix cache has of one text. More is added as the text is computed."""

    def __init__(
        self, cache: PrefixCache, prompt: NDArray[np.int64], found: list[Block], last: Block
    ) -> None:
        """Hold what was found.

        Args:
            cache: where.
            prompt: the text as far as it is known, int64 [n].
            found: the blocks, from the first on.
            last: the last of them, or the root.
        """
        self._cache, self._prompt, self._found = cache, prompt, found
        self._last: Block | None = last
        """None where the text's next block cannot be kept, and so no other behind it."""
        self._count = len(found)

    @property
    def length(self) -> int:
        """Tokens that were found."""
        return len(self._found) * self._cache.block_size

    @property
    def ahead(self) -> tuple[Block, bytes] | None:
        """The block that this text adds next, if others could use it before their last token."""
        if self._last is None or (self._count + 1) * self._cache.block_size >= len(self._prompt):
            return None
        return self._last, self._cache.key(self._prompt, self._count)

    def load(self, cache: KVCache, row: int) -> None:
        """Let an empty row begin with what was found; right behind `PrefixCache.find`."""
        self._cache.load(self._found, cache, row)
        self._cache.queries += len(self._prompt)
        self._cache.hits += self.length

    def has_more(self, length: int) -> bool:
        """Whether a text of `length` tokens has blocks that are not here yet."""
        return self._last is not None and length // self._cache.block_size > self._count

    def extend(self, ids: NDArray[np.int64], cache: KVCache, row: int) -> None:
        """Keep the whole blocks of a text, int64 [n], of which a row of a cache has all."""
        last, whole = self._last, len(ids) // self._cache.block_size
        self._last = None  # for good, if a copy fails
        while last is not None and self._count < whole:
            last = self._cache.save(last, self._count, ids, cache, row)
            self._count += 1
        self._last = last
