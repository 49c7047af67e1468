"""What a bundle really has: bytes of its weight file, and KL divergence on text kept for it."""

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
    """One bundle."""

    size: int
    """Bytes of weights.bin."""
    divergence: float
    """Mean KL(float32 ‖ bundle) over all positions of all contexts, nats."""
    interval: tuple[float, float] | None
    """95 %, by bootstrap over blocks of positions."""


class Judge:
    """Exports, loads and scores one bundle after the other, and deletes it again."""

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
            model: what neo-export takes.
            contexts: token ids [n, S] that no decision was based on.
            reference: float32 logits [S, V] of each.
            statistics: of this model.
            remembered: folder for matrices that were quantized with these statistics.
            base: as `ExportOptions` has it.
            kv_cache: as `ExportOptions` has it; bundles are judged with it.
        """
        self._model = model
        self._contexts = contexts
        self._reference = reference
        self._rounded = ExportOptions(base=base, precision="mixed")
        self._calibrated = replace(
            self._rounded, calibration=statistics, remembered=remembered, kv_cache=kv_cache
        )

    def plan(self, plan: WeightPlan) -> Measured:
        """A calibrated bundle of this plan."""
        return self._measure(replace(self._calibrated, quantization=Quantization(plan=plan)))

    def rounded(self, plan: WeightPlan) -> Measured:
        """A bundle of this plan without statistics, its cache in float."""
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
