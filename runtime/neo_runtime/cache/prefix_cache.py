"""Keys and values of what requests began with, for others that begin alike (prefix caching)."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING

from neo_runtime.backends.base import position_bytes, slots_held
from neo_runtime.cache.prefix_tree import PrefixTree
from neo_runtime.closable import Closable
from neo_runtime.errors import CacheLimitError, NeoError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.backends.base import Backend
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cache.ledger import CacheLedger
    from neo_runtime.cache.prefix_tree import Block

__all__ = ["CachedBeginning", "PrefixCache"]

_BLOCK = 32
"""Tokens of a block: beginnings are found up to a multiple of it."""


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
        self._window = backend.manifest.cache.window
        at_once = min(chunk, self._window or chunk)
        self.positions = min(_BLOCK, at_once)
        """Of a block."""
        self.chunk = at_once // self.positions * self.positions
        """Tokens of a prompt that may be read at once."""
        block = self.positions * position_bytes(backend.manifest)
        if size < block:
            raise RequestError(
                f"a prefix cache of {size} bytes, expected at least {block}: what a block of "
                f"{self.positions} tokens takes"
            )
        slots = size // block
        self.nbytes = slots * block
        """Bytes of keys and values."""
        ledger.reserve(self.nbytes, "the prefix cache")
        try:
            if self.nbytes > sys.maxsize:
                raise MemoryError
            self._pool = backend.open_pool(slots, self.positions)
        except BaseException as error:
            ledger.release(self.nbytes)
            if isinstance(error, MemoryError) and not isinstance(error, NeoError):
                raise CacheLimitError(
                    f"a prefix cache of {self.nbytes} bytes is more than the system has; ask for "
                    "a smaller one"
                ) from error
            raise
        self._release = weakref.finalize(self, ledger.release, self.nbytes)
        self._release.atexit = False
        self._tree = PrefixTree(slots)

    def find(self, ids: NDArray[np.int64]) -> CachedBeginning:
        """What is there of a prompt, int64 [n]: never all of it, as its last token gives logits."""
        count = (len(ids) - 1) // self.positions
        blocks = [self._tokens(ids, index) for index in range(count)]
        found = self._tree.find(blocks)
        return CachedBeginning(self, found, found[-1] if found else self._tree.root)

    def _tokens(self, ids: NDArray[np.int64], index: int) -> bytes:
        return ids[index * self.positions : (index + 1) * self.positions].tobytes()

    def load(self, blocks: list[Block], cache: KVCache, row: int) -> None:
        """Make an empty row of a cache what some blocks hold, one behind the other."""
        slots = [block.slot for block in blocks if block.slot is not None]
        assert len(slots) == len(blocks), "blocks are looked for right before they are read"
        if slots:
            with cache.changing() as store:
                store.load_blocks(row, self._pool, slots)

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
        if parent.slot is None and parent is not self._tree.root:
            return None  # it has made room
        tokens = self._tokens(ids, index)
        there = parent.children.get(tokens)
        if there is not None:
            return there
        start = index * self.positions
        with cache.reading() as store:
            lengths = store.lengths[row : row + 1]
            if start < int((lengths - slots_held(lengths, self._window, store.local_slots))[0]):
                return None  # local layers have evicted a part of it
            block = self._tree.add(parent, tokens)
            if block is None or block.slot is None:
                return None
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

    def __init__(self, cache: PrefixCache, found: list[Block], last: Block) -> None:
        self._cache = cache
        self._found = found
        self.length = len(found) * cache.positions
        """Tokens that were found."""
        self._last: Block | None = last
        """None where the text's next block cannot be kept, and so no other behind it."""
        self._count = len(found)

    def load(self, cache: KVCache, row: int) -> None:
        """Let an empty row begin with what was found; right behind `PrefixCache.find`."""
        self._cache.load(self._found, cache, row)
        self._found = []

    def has_more(self, length: int) -> bool:
        """Whether a text of `length` tokens has blocks that are not here yet."""
        return self._last is not None and length // self._cache.positions > self._count

    def extend(self, ids: NDArray[np.int64], cache: KVCache, row: int) -> None:
        """Keep the whole blocks of a text, int64 [n], of which a row of a cache has all."""
        while self._last is not None and self.has_more(len(ids)):
            self._last = self._cache.save(self._last, self._count, ids, cache, row)
            self._count += 1
