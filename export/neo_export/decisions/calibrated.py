"""Decisions from calibration statistics: outlier migration, GPTQ, and what stays float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_runtime.bundle.manifest import is_quantized
from neo_runtime.errors import StatisticsError

from neo_export.decisions.half_range import HalfRange, find_half_range
from neo_export.gpt_neo.parameters import EMBEDDING, HEAD_INPUT, expected_shapes, input_place
from neo_export.quantize.balance import balanced
from neo_export.quantize.gptq_quantizer import GptqQuantizer
from neo_export.quantize.migration import Migration
from neo_export.quantize.migration_search import Rounding, find_migration
from neo_export.quantize.plan import is_planned
from neo_export.statistics.folder import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.quantize.migration_search import MovedPlace
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer
    from neo_export.targets import Target

__all__ = ["Calibrated", "calibrated", "gptq_quantizer", "open_statistics", "uses_gptq"]


@dataclass(frozen=True)
class Calibrated:
    """Decisions from statistics; the defaults are those without statistics."""

    migration: Migration = field(default_factory=Migration)
    moved: tuple[MovedPlace, ...] = ()
    half: HalfRange = field(default_factory=HalfRange)
    quantizer: WeightQuantizer | None = None
    """Quantizes the weights; None for the target's quantizer without statistics."""
    statistics: Statistics | None = None

    def largest_input(self, weight: str) -> float | None:
        """The largest |x| of a matrix's input after outlier migration; None if unknown."""
        if self.statistics is None:
            return None
        place = input_place(weight)
        low, high = self.statistics.channel_range(place)
        shift = self.migration.shifts.get(place, np.float32(0))
        scale = self.migration.scales.get(place, np.float32(1))
        return float(
            np.maximum(np.abs((low - shift) / scale), np.abs((high - shift) / scale)).max()
        )


def open_statistics(
    folder: Path,
    checkpoint: Checkpoint,
    progress: Callable[[str, int, int], None],
    *,
    second_moments: bool,
) -> Statistics:
    """Open a folder of statistics and check that they are this checkpoint's.

    Args:
        folder: the folder of statistics.
        checkpoint: the model.
        progress: called with a stage's name, done and total.
        second_moments: whether second moments are required (`uses_gptq`).

    Raises:
        StatisticsError: they are another checkpoint's, cannot be read, or lack what is required.
    """
    statistics = Statistics.open(folder)
    if second_moments:
        statistics.require_second_moments()
    statistics.check_model(
        checkpoint, lambda done, all_: progress("checking the statistics", done, all_)
    )
    return statistics


def calibrated(
    statistics: Statistics | None,
    checkpoint: Checkpoint,
    read: Callable[[str], NDArray[np.float32]],
    target: Target,
    precision: str,
    plan: WeightPlan,
    progress: Callable[[str, int, int], None],
    remembered: Path | None = None,
) -> Calibrated:
    """Make the decisions that depend on statistics.

    Args:
        statistics: those of `checkpoint`; None for an export without calibration.
        checkpoint: the model.
        read: returns a weight of the checkpoint by name.
        target: the export's target.
        precision: the export's precision.
        plan: how the decode graph stores each matrix.
        progress: called with a stage's name, done and total.
        remembered: see `ExportOptions.remembered`.

    Raises:
        StatisticsError: float16 cannot hold what the model computes, and keeping tensors in
            float32 does not help.
    """
    if statistics is None:
        return Calibrated()
    linear = target.quantize_linear and is_quantized(precision)
    # bfloat16 has float32's range.
    if precision == "fp16" or linear or (target.half_activations and precision != "bf16"):
        half = find_half_range(
            read,
            tuple(checkpoint.tensors),
            checkpoint.spec,
            statistics,
            lambda done, all_: progress("looking for what float16 cannot hold", done, all_),
        )
        _check_half(target, precision, half)
        if not target.rounds_activations(precision):
            return Calibrated(half=half, statistics=statistics)
        if not linear:
            quantizer = gptq_quantizer(statistics, Migration(), checkpoint.spec, target)
            return Calibrated(half=half, quantizer=quantizer)

    def rounding_of(name: str) -> Rounding | None:
        storage = plan.of(name)
        return Rounding(storage.block_size) if storage.kind in ("int8", "int4") else None

    migration, moved = find_migration(
        read,
        checkpoint.spec,
        statistics,
        rounding_of,
        lambda done, all_: progress("looking for outliers", done, all_),
        remembered,
    )
    gptq = None
    if not target.quantize_linear:
        migration = balanced(migration, read, checkpoint.spec, plan)
        gptq = gptq_quantizer(statistics, migration, checkpoint.spec, target)
    return Calibrated(migration, moved, quantizer=gptq, statistics=statistics)


def uses_gptq(target: Target, plan: WeightPlan, spec: ModelSpec) -> bool:
    """Whether an export with statistics chooses integers by the inputs' second moments.

    Args:
        target: the export's target.
        plan: how the decode graph stores each matrix; the other graphs store integers only for
            matrices that decode stores as integers, too.
        spec: the model.
    """
    if target.quantize_linear:
        return False
    tied = spec.tie_word_embeddings  # an untied table is only looked up: it is plainly rounded
    names = [
        name
        for name, shape in expected_shapes(spec).items()
        if is_planned(name, shape) and (tied or name != EMBEDDING)
    ]
    return not plan.kinds(names).isdisjoint(("int8", "int4"))


def gptq_quantizer(
    statistics: Statistics, migration: Migration, spec: ModelSpec, target: Target
) -> GptqQuantizer:
    """GPTQ for the inputs after outlier migration."""

    def second_moment(place: str) -> NDArray[np.floating[Any]]:
        both = statistics.second_moment(place), statistics.channel_mean(place)
        return migration.second_moment(place, both)

    return GptqQuantizer(
        second_moment,
        tied=spec.tie_word_embeddings,
        eight_bits=target.half_activations,
        table_scale=migration.scales.get(HEAD_INPUT),
        likely=statistics.likely,
    )


def _check_half(target: Target, precision: str, half: HalfRange) -> None:
    if half.tensors and precision != "fp16":
        first = half.tensors[0]
        raise StatisticsError(
            f"{first.name} {first.reason}: target {target.name} computes in float16 between "
            f"{precision} weights; export with --fp16, which keeps such tensors in float32"
        )
