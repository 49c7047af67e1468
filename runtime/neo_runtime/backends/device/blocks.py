"""A pool of slots in device memory; see `BlockPool`."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.base import BlockPool, position_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.backends.device.base import Device
    from neo_runtime.backends.device.idle_pool import IdlePool
    from neo_runtime.backends.device.leftovers import Leftovers
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["DeviceBlocks", "new_blocks"]


class DeviceBlocks(BlockPool):
    """Slots one behind the other, each [tensors, heads, positions, bytes of a position]."""

    def __init__(
        self, address: int, manifest: Manifest, block_size: int, give_back: Callable[[], None]
    ) -> None:
        """Cut up memory that was allocated.

        Args:
            address: of the first slot.
            manifest: of the bundle whose keys and values these are.
            block_size: positions of a slot.
            give_back: frees the memory; called once, at `close` or for a pool that is garbage.
        """
        self.block_size = block_size
        self._address = address
        self._slot_size = block_size * position_bytes(manifest)
        self._tensor_size = self._slot_size // (2 * manifest.model.num_layers)
        self._give_back = weakref.finalize(self, give_back)
        self._give_back.atexit = False  # the system takes everything then

    def addresses(self, slot: int) -> list[int]:
        """Of the tensors of a slot: layer by layer, keys first."""
        first = self._address + slot * self._slot_size
        return list(range(first, first + self._slot_size, self._tensor_size))

    def close(self) -> None:
        """See `BlockPool.close`."""
        self._give_back()


def new_blocks(
    manifest: Manifest,
    device: Device,
    idle: IdlePool[Any],
    leftovers: Leftovers,
    slots: int,
    block_size: int,
) -> DeviceBlocks:
    """Allocate a pool, for which idle buffers make room.

    Raises:
        DeviceMemoryError: the device has no room.
    """
    size = slots * block_size * position_bytes(manifest)
    with leftovers.cleared():
        address = idle.take_other(partial(device.allocate, size))
    # Nothing of the backend: a pool must not keep it from being garbage.
    give_back = partial(leftovers.leave, partial(idle.give_other, partial(device.free, address)))
    return DeviceBlocks(address, manifest, block_size, give_back)
