"""A `BlockPool` in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import BlockPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.bundle.manifest import Manifest

__all__ = ["HostBlocks"]


class HostBlocks(BlockPool):
    """Slots in one array, which takes physical memory only as slots are first written."""

    def __init__(self, manifest: Manifest, slots: int, block_size: int) -> None:
        model = manifest.model
        shape = (slots, 2 * model.num_layers, model.num_heads, block_size, model.head_dim)
        self.block_size = block_size
        self.arrays: NDArray[Any] = np.zeros(shape, dtype=manifest.cache.dtype)
        """[slots, tensors, heads, block_size, head_dim]; tensors layer by layer, keys first."""

    def close(self) -> None:
        """See `BlockPool.close`."""
        self.arrays = self.arrays[:0].copy()
