"""Which beginnings of texts are kept, and in which slots: a tree of blocks of tokens.

    root ─ "Q: What is the sky? A:" ─ " blue Q: What is grass? A:" ─ …
         └ "Once upon a time there w" ─ …

What a block holds depends on all tokens before it, so a block belongs to the one that it follows.
When slots run out, the block that was used longest ago makes room. A block counts as used after
those behind it, so that one is always a leaf.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Block", "PrefixTree"]


class Block:
    """Some tokens behind others, and where their keys and values are."""

    __slots__ = ("children", "is_kept", "parent", "slot", "tokens")

    def __init__(self, tokens: bytes, parent: Block | None, slot: int) -> None:
        self.tokens = tokens
        self.parent = parent
        """None for the root."""
        self.slot = slot
        self.is_kept = True
        """Until the block has made room for another."""
        self.children: dict[bytes, Block] = {}


class PrefixTree:
    """See the module. It knows nothing of what is in the slots. One thread at a time."""

    def __init__(self, slots: int) -> None:
        """Begin with nothing.

        Args:
            slots: how many blocks can be kept.
        """
        self.root = Block(b"", None, -1)
        self._free = list(range(slots))[::-1]
        self._by_use: OrderedDict[Block, None] = OrderedDict()
        """Those used longest ago first."""

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._by_use)

    def find(self, blocks: list[bytes]) -> list[Block]:
        """The longest beginning of some blocks that is kept; it counts as used now."""
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
        """Keep a block behind another that is kept.

        Returns:
            A new block, whose slot the caller fills; None where every slot is part of what the
            block follows.
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
        """Forget a leaf."""
        assert block.parent is not None
        assert not block.children
        del self._by_use[block], block.parent.children[block.tokens]
        self._free.append(block.slot)
        block.is_kept = False

    def _evict(self, parent: Block) -> int | None:
        oldest = next(iter(self._by_use), None)
        if oldest is None or oldest is parent:  # as all that is left leads to it
            return None
        self.remove(oldest)
        return self._free.pop()

    def _use(self, block: Block) -> None:
        while block.parent is not None:
            self._by_use.move_to_end(block)
            block = block.parent
