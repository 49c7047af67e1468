"""What an export makes of statistics: outliers moved into the weights, tensors kept wide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_export.passes.migrate_activations import migrate_activations
from neo_export.quantize.migration import Migration
from neo_export.quantize.migration_search import Rounding, find_migration
from neo_export.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from neo_export.checkpoint import Checkpoint
    from neo_export.passes import Pass
    from neo_export.quantize.migration_search import MovedPlace
    from neo_export.quantize.plan import WeightPlan

__all__ = ["Calibrated", "calibrated", "open_statistics"]


@dataclass(frozen=True)
class Calibrated:
    """Decisions that rest on statistics; without any, none are taken."""

    migration: Migration = field(default_factory=Migration)
    moved: tuple[MovedPlace, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What runs on a portable graph before anything else."""
        return (migrate_activations(self.migration),) if self.migration.in_graph else ()


def open_statistics(
    folder: Path | None, checkpoint: Checkpoint, progress: Callable[[str, int, int], None]
) -> Statistics | None:
    """Open a folder of statistics and make sure that they are this checkpoint's.

    Raises:
        StatisticsError: they are not, or cannot be read.
    """
    if folder is None:
        return None
    statistics = Statistics.open(folder)
    statistics.check_model(
        checkpoint, lambda done, all_: progress("checking the statistics", done, all_)
    )
    return statistics


def calibrated(
    statistics: Statistics | None,
    checkpoint: Checkpoint,
    read: Callable[[str], NDArray[np.float32]],
    plan: WeightPlan,
    progress: Callable[[str, int, int], None],
) -> Calibrated:
    """Decide.

    Args:
        statistics: of `checkpoint`; None for an export without.
        checkpoint: the model.
        read: gives its weights.
        plan: how the decode graph stores each matrix.
        progress: called with a stage's name, done and total.
    """
    if statistics is None:
        return Calibrated()

    def rounding_of(name: str) -> Rounding | None:
        storage = plan.of(name)
        return Rounding(storage.block_size) if storage.kind in ("int8", "int4") else None

    migration, moved = find_migration(
        read,
        checkpoint.spec,
        statistics,
        rounding_of,
        lambda done, all_: progress("moving outliers", done, all_),
    )
    return Calibrated(migration, moved)
