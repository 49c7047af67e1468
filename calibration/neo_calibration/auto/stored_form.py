"""Rounds a matrix, and the inputs of its product, as an export with a given storage would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.decisions.calibrated import gptq_quantizer
from neo_export.gpt_neo.parameters import PROJECTIONS, input_place, place_in_packed
from neo_export.quantize.balance import balanced
from neo_export.quantize.migration import Migration
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.quantize.remembered import Remembered
from neo_export.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from neo_export.statistics.folder import Statistics
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

__all__ = ["StoredForm"]


class StoredForm:
    """Quantizes with statistics, for the CPU target.

    Outliers are not migrated here, but they are in the bundles that are measured. So for a model
    with outliers the estimated divergence is too high, never too low.
    """

    def __init__(
        self,
        read: Callable[[str], NDArray[np.float32]],
        spec: ModelSpec,
        statistics: Statistics,
        remembered: Path,
    ) -> None:
        """Prepare; nothing is quantized yet.

        Args:
            read: returns a weight of the checkpoint by name.
            spec: the architecture.
            statistics: those of this checkpoint.
            remembered: folder that caches quantized matrices.
        """
        every = WeightPlan(Storage("int4", 16))
        self._scales = balanced(Migration(), read, spec, every)
        target = TARGETS["cpu"]
        self._int8 = Remembered(gptq_quantizer(statistics, Migration(), spec, target), remembered)
        self._int4 = Remembered(gptq_quantizer(statistics, self._scales, spec, target), remembered)

    def weights(
        self, weights: Mapping[str, NDArray[np.float32]], storage: Storage
    ) -> dict[str, NDArray[np.float32]]:
        """Matrices [out, in] of one group, quantized and dequantized.

        Query, key and value projections are quantized as one packed matrix, as in an export, so
        that the export finds it in the cache.
        """
        place = place_in_packed(next(iter(weights)))
        if place is None or len(weights) < len(PROJECTIONS):
            return {name: self._one(name, weight, storage) for name, weight in weights.items()}
        whole = self._one(place[0], np.concatenate([*weights.values()]), storage)
        parts = np.split(whole, len(PROJECTIONS))
        return dict(zip(weights, parts, strict=True))

    def _one(self, name: str, weight: NDArray[np.float32], storage: Storage) -> NDArray[np.float32]:
        if storage.kind == "int8":
            return self._int8.int8(name, weight).read_back()
        assert storage.block_size is not None
        scaled = self._scales.reading(lambda _: weight)(name)
        made = self._int4.int4(name, scaled, storage.block_size).read_back()
        return self._scales.restoring(lambda _: made)(name)

    def inputs(self, name: str, x: Any, storage: Storage) -> Any:
        """A tensor of activations rounded to 8 bits; one scale per row (int8) or block (int4)."""
        import torch

        scale: Any = 1.0
        if storage.kind == "int4":
            found = self._scales.scales.get(input_place(name))
            scale = 1.0 if found is None else torch.from_numpy(np.array(found))
        blocks = (x / scale).reshape(*x.shape[:-1], -1, storage.block_size or x.shape[-1])
        step = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
        return ((blocks / step).round() * step).reshape(x.shape) * scale
