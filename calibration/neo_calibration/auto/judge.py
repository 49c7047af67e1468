"""Measures a bundle: bytes of its weight file, and KL divergence on held-out text."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
from neo_export.comparison.metrics import bootstrap_interval, kl_divergence
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import Quantization

if TYPE_CHECKING:
    from neo_export.quantize.plan import WeightPlan
    from numpy.typing import NDArray

__all__ = ["Judge", "Measured"]


@dataclass(frozen=True)
class Measured:
    """The measurements of one bundle."""

    size: int
    """Bytes of weights.bin."""
    divergence: float
    """Mean KL(float32 ‖ bundle) over all positions of all contexts, nats."""
    interval: tuple[float, float] | None
    """95 % interval of the divergence, by bootstrap over blocks of positions."""


class Judge:
    """Exports, loads and scores one bundle after the other, deleting each afterwards."""

    def __init__(
        self,
        model: str,
        contexts: NDArray[np.int64],
        reference: list[NDArray[np.float32]],
        statistics: Path,
        remembered: Path,
        *,
        base: str | None = None,
        kv_cache: str = "float",
    ) -> None:
        """Prepare.

        Args:
            model: MODEL of neo-export.
            contexts: token ids [n, S] that no decision was based on.
            reference: float32 logits [S, V] of each context.
            statistics: folder with this model's statistics.
            remembered: folder that caches matrices quantized with these statistics.
            base: see `ExportOptions.base`.
            kv_cache: see `ExportOptions.kv_cache`; bundles are measured with it.
        """
        self._model = model
        self._contexts = contexts
        self._reference = reference
        self._rounded = ExportOptions(base=base, precision="mixed")
        self._calibrated = replace(
            self._rounded, calibration=statistics, remembered=remembered, kv_cache=kv_cache
        )

    def plan(self, plan: WeightPlan) -> Measured:
        """Measure a calibrated bundle of this plan."""
        return self._measure(replace(self._calibrated, quantization=Quantization(plan=plan)))

    def rounded(self, plan: WeightPlan) -> Measured:
        """Measure a bundle of this plan without statistics, with a float cache."""
        return self._measure(replace(self._rounded, quantization=Quantization(plan=plan)))

    def _measure(self, options: ExportOptions) -> Measured:
        with tempfile.TemporaryDirectory(prefix="neo-auto-") as folder:
            bundle = Path(folder, "bundle")
            size = export_bundle(self._model, bundle, options).weight_bytes
            with neo_runtime.load(bundle) as model:
                found = np.concatenate(
                    [
                        kl_divergence(exact, model.logits(ids))
                        for ids, exact in zip(self._contexts, self._reference, strict=True)
                    ]
                )
        return Measured(size, float(found.mean()), bootstrap_interval(found))
