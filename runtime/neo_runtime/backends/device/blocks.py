"""A `BlockPool` in device memory."""

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
    """Contiguous slots, each [tensors, heads, block_size, head_dim]."""

    def __init__(
        self, address: int, manifest: Manifest, block_size: int, give_back: Callable[[], None]
    ) -> None:
        """Divide allocated memory into slots.

        Args:
            address: address of the first slot.
            manifest: the bundle's manifest.
            block_size: positions per slot.
            give_back: frees the memory; called once, on `close` or garbage collection.
        """
        self.block_size = block_size
        self._address = address
        self._slot_size = block_size * position_bytes(manifest)
        self._tensor_size = self._slot_size // (2 * manifest.model.num_layers)
        self._give_back = weakref.finalize(self, give_back)
        self._give_back.atexit = False  # the system frees everything when the process ends

    def addresses(self, slot: int) -> list[int]:
        """Addresses of a slot's tensors: layer by layer, keys first."""
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
    """Allocate a pool, freeing idle buffers if needed.

    Args:
        manifest: the bundle's manifest.
        device: where to allocate.
        idle: the backend's pool of idle buffers.
        leftovers: the backend's deferred releases.
        slots: number of slots.
        block_size: positions per slot.

    Raises:
        DeviceMemoryError: the device has too little free memory.
    """
    size = slots * block_size * position_bytes(manifest)
    with leftovers.cleared():
        address = idle.take_other(partial(device.allocate, size))
    # This must not refer to the backend, or a pool would keep it alive.
    give_back = partial(leftovers.leave, partial(idle.give_other, partial(device.free, address)))
    return DeviceBlocks(address, manifest, block_size, give_back)
