"""A pool that keeps idle device buffers for reuse, and frees them when memory runs short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from neo_runtime.errors import DeviceMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IdlePool", "Pooled"]

_KEPT = 8
"""Most idle buffers that a pool keeps."""


class Pooled(Protocol):
    """Buffers that a pool can keep."""

    @property
    def key(self) -> tuple[int, ...]:
        """Their size: the arguments of `IdlePool.take` that they satisfy."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""

    def clear(self) -> None:
        """Reset the contents for a new user."""

    def free(self) -> None:
        """Free the memory."""


Item = TypeVar("Item", bound=Pooled)
Result = TypeVar("Result")


class IdlePool(Generic[Item]):
    """Allocates buffers, and keeps the most recently returned ones for reuse. Not thread-safe.

    Args:
        make: allocates buffers; gets the arguments of `take`.
        most_idle: most bytes of all idle buffers together; one is kept whatever its size.
    """

    def __init__(self, make: Callable[..., Item], most_idle: int) -> None:
        self._make, self._most_idle = make, most_idle
        self._idle: list[Item] = []
        self._taken: list[Item] = []
        self._others = 0
        self._at_end: Callable[[], None] | None = None

    def take(self, *key: int) -> Item:
        """Buffers of this size, cleared; idle ones if there are any.

        Raises:
            DeviceMemoryError: too little memory is free, even after freeing the idle buffers.
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
        """Return buffers to the pool; above its limits the ones idle for longest are freed."""
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
        """Call `work`, which allocates device memory; if it fails, free idle buffers and retry.

        Raises:
            DeviceMemoryError: too little memory is free, even after freeing the idle buffers.
        """
        try:
            return work()
        except DeviceMemoryError:
            if not self.free_idle():
                raise
        return work()

    def take_other(self, make: Callable[[], Result]) -> Result:
        """Allocate something that is not kept by this pool, as `with_room` does.

        The callback of `close` waits until it is returned by `give_other`.

        Raises:
            DeviceMemoryError: too little memory is free, even after freeing the idle buffers.
        """
        made = self.with_room(make)
        self._others += 1
        return made

    def give_other(self, free: Callable[[], None]) -> None:
        """Free what `take_other` allocated, by calling `free`."""
        self._others -= 1
        free()
        if self._at_end is not None:
            self._end()

    def free_idle(self) -> bool:
        """Free the idle buffers. Returns whether there were any."""
        found = bool(self._idle)
        while self._idle:
            self._idle.pop().free()
        return found

    def close(self, at_end: Callable[[], None]) -> None:
        """Free idle buffers now, and those in use when they are returned.

        Args:
            at_end: called once everything has been freed.
        """
        self._at_end = at_end
        self._end()

    def _end(self) -> None:
        self.free_idle()
        if self._at_end is not None and not self._taken and not self._others:
            self._at_end()

    @property
    def items(self) -> list[Item]:
        """All buffers, idle or in use."""
        return [*self._idle, *self._taken]
