"""Which blocks are kept, found, and make room: against a plain list of everything that was used."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neo_runtime.cache.prefix_tree import Block, PrefixTree

TEXTS = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=5)


class Plain:
    """What is kept, as whole texts, the one used longest ago first."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.kept: list[tuple[bytes, ...]] = []

    def find(self, text: tuple[bytes, ...]) -> int:
        count = 0
        while count < len(text) and text[: count + 1] in self.kept:
            count += 1
        self.use(text[:count])
        return count

    def use(self, text: tuple[bytes, ...]) -> None:
        for end in range(len(text), 0, -1):  # what is behind counts as used before
            self.kept.remove(text[:end])
            self.kept.append(text[:end])

    def add(self, text: tuple[bytes, ...]) -> tuple[bool, tuple[bytes, ...] | None]:
        """Whether there is room for one more block, and which makes it."""
        self.use(text[:-1])
        evicted = None
        if len(self.kept) == self.slots:
            if not self.kept or self.kept[0] == text[:-1]:
                return False, None
            evicted = self.kept.pop(0)
        self.kept.append(text)
        self.use(text)
        return True, evicted


@given(st.integers(0, 6), st.lists(TEXTS, max_size=40))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_kept(slots: int, texts: list[list[bytes]]) -> None:
    tree, plain = PrefixTree(slots), Plain(slots)
    blocks: dict[tuple[bytes, ...], Block] = {}
    for given_text in texts:
        text = tuple(given_text)
        found = tree.find(list(text))
        assert len(found) == plain.find(text)
        assert [blocks[text[: end + 1]] for end in range(len(found))] == found
        block = found[-1] if found else tree.root
        for end in range(len(found) + 1, len(text) + 1):
            new = tree.add(block, text[end - 1])
            is_kept, evicted = plain.add(text[:end])
            assert (new is not None) == is_kept
            if evicted is not None:
                gone = blocks.pop(evicted)
                assert not gone.is_kept
                assert not gone.children
            if new is None:
                break
            block = blocks[text[:end]] = new
        assert len(tree) == len(plain.kept) <= slots
        assert set(blocks) == set(plain.kept)
        taken = [kept.slot for kept in blocks.values()]
        assert sorted(taken) == sorted(set(taken) & set(range(slots)))


def test_what_is_added_to_counts_as_used() -> None:
    """A text that goes on after a while, as an answer does, keeps what it has."""
    tree = PrefixTree(2)
    first, other = tree.add(tree.root, b"a"), tree.add(tree.root, b"b")
    assert first is not None
    assert other is not None
    assert tree.add(first, b"c") is not None
    assert first.is_kept
    assert not other.is_kept


def test_a_block_that_could_not_be_filled() -> None:
    tree = PrefixTree(1)
    block = tree.add(tree.root, b"a")
    assert block is not None
    tree.remove(block)
    assert tree.find([b"a"]) == []
    assert tree.add(tree.root, b"b") is not None
