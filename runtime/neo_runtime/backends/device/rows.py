"""Move, clear and copy rows of a cache in device memory."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.backends.base import CacheStore, with_empty_rows
from neo_runtime.backends.device.blocks import DeviceBlocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from neo_runtime.backends.base import BlockPool
    from neo_runtime.backends.device.base import Device

__all__ = ["CacheTensors", "DeviceRowsStore"]


@dataclass(frozen=True)
class CacheTensors:
    """Addresses and shape of a cache's tensors.

    Methods queue their work: the caller holds the device's lock, and synchronizes.
    """

    device: Device
    allocate: Callable[[int], int]
    """Allocates temporary device memory; freed by `Device.free`."""
    addresses: Sequence[int]
    """Address of each tensor, [batch, heads, length, head_dim]."""
    heads: int
    length: int
    position: int
    """Bytes per position and head."""

    @property
    def _pitch(self) -> int:
        return self.length * self.position

    def clear(self, row: int, count: int) -> None:
        """Set `count` rows to zero, from `row` on."""
        stride = self.heads * self._pitch
        for address in self.addresses:
            self.device.zero(address + row * stride, count * stride)

    def fill(self, rows: Sequence[int], source: CacheTensors, used: int) -> None:
        """Copy the first `used` positions of another cache's row 0 into some rows."""
        if not used:
            return
        for target, other in zip(self.addresses, source.addresses, strict=True):
            for row in rows:
                to = target + row * self.heads * self._pitch
                width = used * self.position
                self.device.copy_rows(to, self._pitch, other, source._pitch, width, self.heads)

    def move(self, sources: Sequence[int], targets: Sequence[int], used: int) -> None:
        """Copy the first `used` positions of each source row to the matching target row.

        A row may be both source and target. Synchronizes the device.
        """
        heads, pitch, width = self.heads, self._pitch, max(used, 1) * self.position
        block = self.allocate(heads * width * len(sources))
        try:
            for tensor in self.addresses:
                for index, source in enumerate(sources):
                    packed, row = block + index * heads * width, tensor + source * heads * pitch
                    self.device.copy_rows(packed, width, row, pitch, width, heads)
                for index, target in enumerate(targets):
                    packed, row = block + index * heads * width, tensor + target * heads * pitch
                    self.device.copy_rows(row, pitch, packed, width, width, heads)
            self.device.synchronize()
        finally:
            self.device.free(block)

    def save(self, row: int, start: int, pool: DeviceBlocks, slot: int) -> None:
        """Copy `pool.block_size` positions from `start` on into a slot."""
        for inside, outside, width in self._places(row, start, pool, slot):
            self.device.copy_rows(outside, width, inside, self._pitch, width, self.heads)

    def load(self, row: int, pool: DeviceBlocks, slots: Sequence[int]) -> None:
        """Copy slots, in this order, to the beginning of a row."""
        for index, slot in enumerate(slots):
            start = index * pool.block_size
            for inside, outside, width in self._places(row, start, pool, slot):
                self.device.copy_rows(inside, self._pitch, outside, width, width, self.heads)

    def _places(
        self, row: int, start: int, pool: DeviceBlocks, slot: int
    ) -> Iterator[tuple[int, int, int]]:
        """For each tensor: address in the cache, address in the slot, slot bytes per head."""
        offset = row * self.heads * self._pitch + start * self.position
        for tensor, outside in zip(self.addresses, pool.addresses(slot), strict=True):
            yield tensor + offset, outside, pool.block_size * self.position


class DeviceRowsStore(CacheStore):
    """The row operations of stores in device memory."""

    @abstractmethod
    def _tensors(self) -> CacheTensors:
        """The cache's tensors.

        Raises:
            NeoError: the store is closed.
        """

    @abstractmethod
    def _alone(self) -> AbstractContextManager[None]:
        """A context manager that holds the device's lock, and synchronizes at its end.

        Raises:
            NeoError: the model is closed.
        """

    def _rows_changed(self) -> None:
        """Called after each change of `lengths`."""
        return

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """See `CacheStore.reorder`."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if len(moved):
            sources = rows[moved]
            with self._alone():
                used = int(self.lengths[sources].max())
                self._tensors().move(sources.tolist(), moved.tolist(), used)
        self.lengths = self.lengths[rows]
        self._rows_changed()

    def extend(self, count: int) -> None:
        """See `CacheStore.extend`. Rows are zeroed: masked values are still multiplied by 0."""
        with self._alone():
            self._tensors().clear(self.batch, count)
        self.lengths = with_empty_rows(self.lengths, count)
        self._rows_changed()

    def fill(self, rows: NDArray[np.int64], source: CacheStore) -> None:
        """See `CacheStore.fill`."""
        assert isinstance(source, DeviceRowsStore)
        used = int(source.lengths[0])
        with self._alone():
            self._tensors().fill(rows.tolist(), source._tensors(), used)
        self.lengths[rows] = used
        self._rows_changed()

    def save_block(self, row: int, start: int, pool: BlockPool, slot: int) -> None:
        """See `CacheStore.save_block`."""
        assert isinstance(pool, DeviceBlocks)
        with self._alone():
            self._tensors().save(row, start, pool, slot)

    def load_blocks(self, row: int, pool: BlockPool, slots: Sequence[int]) -> None:
        """See `CacheStore.load_blocks`."""
        assert isinstance(pool, DeviceBlocks)
        with self._alone():
            self._tensors().load(row, pool, slots)
        self.lengths[row] = len(slots) * pool.block_size
        self._rows_changed()
