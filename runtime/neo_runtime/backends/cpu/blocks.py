"""A pool of slots in the system's memory; see `BlockPool`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import BlockPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.bundle.manifest import Manifest

__all__ = ["HostBlocks"]


class HostBlocks(BlockPool):
    """Memory that comes from the system page by page, as slots are first written."""

    def __init__(self, manifest: Manifest, slots: int, block_size: int) -> None:
        model = manifest.model
        shape = (slots, 2 * model.num_layers, model.num_heads, block_size, model.head_dim)
        self.block_size = block_size
        self.arrays: NDArray[Any] = np.zeros(shape, dtype=manifest.cache.dtype)
        """By slot, and by tensor: layer by layer, keys first."""

    def close(self) -> None:
        """See `BlockPool.close`."""
        self.arrays = self.arrays[:0].copy()
