"""Index of the prefix cache: a tree of blocks of tokens, each with its slot.

    root ─ "Q: What is the sky? A:" ─ " blue Q: What is grass? A:" ─ …
         └ "Once upon a time there w" ─ …

Keys and values of a block depend on all tokens before it, so a block is a child of the one that it
follows. When slots run out, the least recently used block is evicted. Each use of a block also
uses its ancestors, and these last, so the least recently used block is always a leaf.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Block", "PrefixTree"]


class Block:
    """A block of tokens after its parent, and the slot of its keys and values."""

    __slots__ = ("children", "is_kept", "parent", "slot", "tokens")

    def __init__(self, tokens: bytes, parent: Block | None, slot: int) -> None:
        self.tokens = tokens
        self.parent = parent
        """None for the root."""
        self.slot = slot
        self.is_kept = True
        """False once the block was evicted."""
        self.children: dict[bytes, Block] = {}


class PrefixTree:
    """See the module docstring. Does not access the slots' contents. One thread at a time."""

    def __init__(self, slots: int) -> None:
        """Begin with an empty tree.

        Args:
            slots: most blocks that can be stored.
        """
        self.root = Block(b"", None, -1)
        self._free = list(range(slots))[::-1]
        self._by_use: OrderedDict[Block, None] = OrderedDict()
        """All blocks, least recently used first."""

    def __len__(self) -> int:
        """Number of blocks stored."""
        return len(self._by_use)

    def find(self, blocks: list[bytes]) -> list[Block]:
        """The longest stored prefix of a sequence of blocks; this counts as a use of it."""
        found: list[Block] = []
        block = self.root
        for tokens in blocks:
            child = block.children.get(tokens)
            if child is None:
                break
            found.append(block := child)
        self._use(block)
        return found

    def add(self, parent: Block, tokens: bytes) -> Block | None:
        """Add a block after another.

        Returns:
            The new block, whose slot the caller fills; None if all slots hold its ancestors.
        """
        assert parent.is_kept
        assert tokens not in parent.children
        self._use(parent)
        slot = self._free.pop() if self._free else self._evict(parent)
        if slot is None:
            return None
        block = parent.children[tokens] = Block(tokens, parent, slot)
        self._by_use[block] = None
        self._use(block)
        return block

    def remove(self, block: Block) -> None:
        """Remove a leaf and free its slot."""
        assert block.parent is not None
        assert not block.children
        del self._by_use[block], block.parent.children[block.tokens]
        self._free.append(block.slot)
        block.is_kept = False

    def _evict(self, parent: Block) -> int | None:
        oldest = next(iter(self._by_use), None)
        if oldest is None or oldest is parent:  # then all blocks left are ancestors of the new one
            return None
        self.remove(oldest)
        return self._free.pop()

    def _use(self, block: Block) -> None:
        while block.parent is not None:
            self._by_use.move_to_end(block)
            block = block.parent
