"""Buffers of a device that are kept for the next use of their size, and freed for want of room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from neo_runtime.errors import DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IdlePool", "Pooled"]

_KEPT = 8
"""Idle buffers that a pool keeps at most."""


class Pooled(Protocol):
    """What a pool keeps."""

    @property
    def key(self) -> tuple[int, ...]:
        """Its size, as `IdlePool.take` is asked for it."""

    @property
    def nbytes(self) -> int:
        """Its bytes on the device."""

    def clear(self) -> None:
        """Make it what a new user expects to find."""

    def free(self) -> None:
        """Give its memory back."""


Item = TypeVar("Item", bound=Pooled)
Result = TypeVar("Result")


class IdlePool(Generic[Item]):
    """Makes buffers, and keeps those that are given back, the latest first.

    Args:
        make: makes one of the size that `take` is asked for.
        most_idle: bytes that idle buffers may have together; one is kept whatever its size.
    """

    def __init__(self, make: Callable[..., Item], most_idle: int) -> None:
        self._make, self._most_idle = make, most_idle
        self._idle: list[Item] = []
        self._taken: list[Item] = []
        self._others = 0
        self._at_end: Callable[[], None] | None = None

    def take(self, *key: int) -> Item:
        """Cleared buffers of this size.

        Raises:
            DeviceMemoryError: the device has no room, even without the idle ones.
        """
        fitting = [item for item in self._idle if item.key == key]
        if fitting:
            item = fitting[-1]
            self._idle.remove(item)
        else:
            item = self.with_room(lambda: self._make(*key))
        self._taken.append(item)
        try:
            item.clear()
        except BaseException:
            self.give(item)
            raise
        return item

    def give(self, item: Item) -> None:
        """Keep buffers for later; those that were idle for longest make room for them."""
        self._taken.remove(item)
        self._idle.append(item)
        if self._at_end is not None:
            self._end()
        while self._is_crowded():
            self._idle.pop(0).free()

    def _is_crowded(self) -> bool:
        size = sum(item.nbytes for item in self._idle)
        return len(self._idle) > _KEPT or (len(self._idle) > 1 and size > self._most_idle)

    def with_room(self, work: Callable[[], Result]) -> Result:
        """Do what needs memory of the device; if there is too little, once more without idle ones.

        Raises:
            DeviceMemoryError: it does not fit even so.
        """
        try:
            return work()
        except DeviceMemoryError:
            if not self.free_idle():
                raise
        return work()

    def take_other(self, make: Callable[[], Result]) -> Result:
        """Make what is no buffer of this pool, for which idle ones make room; the end waits for it.

        Raises:
            DeviceMemoryError: the device has no room, even without the idle ones.
        """
        made = self.with_room(make)
        self._others += 1
        return made

    def give_other(self, free: Callable[[], None]) -> None:
        """Free what `take_other` gave."""
        self._others -= 1
        free()
        if self._at_end is not None:
            self._end()

    def free_idle(self) -> bool:
        """Free the idle buffers; whether there were any."""
        found = bool(self._idle)
        while self._idle:
            self._idle.pop().free()
        return found

    def close(self, at_end: Callable[[], None]) -> None:
        """Free the idle buffers now, and the others when they are given back.

        Args:
            at_end: called once none is left.
        """
        self._at_end = at_end
        self._end()

    def _end(self) -> None:
        self.free_idle()
        if self._at_end is not None and not self._taken and not self._others:
            self._at_end()

    @property
    def items(self) -> list[Item]:
        """All that there are, idle or taken."""
        return [*self._idle, *self._taken]
