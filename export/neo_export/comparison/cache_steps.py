"""The steps of a bundle's int8 cache, read from the graph that writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from neo_runtime.errors import BundleDamagedError

from neo_export.passes.quantize_cache import cache_factors
from neo_export.quantize.kv_cache import CacheSteps

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.bundle.manifest import Manifest
    from numpy.typing import NDArray

__all__ = ["read_cache_steps"]


def read_cache_steps(folder: Path, manifest: Manifest) -> CacheSteps | None:
    """The quantization step of each layer and channel; None for a cache that is not int8.

    Raises:
        BundleDamagedError: the decode graph lacks the cache's steps for a layer.
    """
    if manifest.cache.dtype != "int8":
        return None
    path = folder / manifest.graphs["decode"].file
    initializers = ir.load(path).graph.initializers
    keys, values = [], []
    for layer in range(manifest.model.num_layers):
        into, out = cache_factors(layer)
        for name in (into, out):
            if name not in initializers:
                raise BundleDamagedError(
                    f"{path} has no {name}, which holds the scales of its int8 cache; "
                    "export the bundle again"
                )
        keys.append(np.split(_array(initializers[into]), 3)[0])
        values.append(_array(initializers[out]))
    return CacheSteps(key=tuple(keys), value=tuple(values))


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    array: NDArray[np.float32] = np.array(value.const_value.numpy(), dtype=np.float32)
    return array
