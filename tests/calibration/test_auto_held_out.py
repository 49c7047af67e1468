"""What `--auto` is worth on text that neither the statistics nor the search saw: real bundles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from helpers.held_out import held_out_ids
from helpers.models import DEMO
from neo_calibration.auto.choose import Chooser
from neo_calibration.auto.judge import Judge, Measured
from neo_calibration.auto.search import Frontier, FrontierPlan, frontier_of
from neo_calibration.auto.sensitivity import groups_of, measure_sensitivities, reference_logits
from neo_calibration.auto.stored_form import StoredForm
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.statistics.folder import Statistics

if TYPE_CHECKING:
    from pathlib import Path

INT8 = Storage("int8")
SMALL, INT4, LARGE = (Storage("int4", block) for block in (16, 32, 64))


@dataclass(frozen=True)
class Found:
    """A search on the demo model, and bundles with all matrices alike."""

    frontier: Frontier
    chooser: Chooser
    searched: Judge
    """What `chooser` measures with."""
    other: Judge
    """Measures on text that nothing was decided on."""

    def on_other(self, plan: FrontierPlan) -> Measured:
        if plan.plan not in self.kept:
            self.kept[plan.plan] = self.other.plan(plan.plan)
        return self.kept[plan.plan]

    kept: dict[WeightPlan, Measured] = field(default_factory=dict)
    """What `on_other` has measured."""


@pytest.fixture(scope="module")
def found(statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    remembered = tmp_path_factory.mktemp("remembered")
    ids = held_out_ids(10, 512)
    with open_checkpoint(DEMO) as checkpoint:
        spec, shapes = checkpoint.spec, expected_shapes(checkpoint.spec)
        stored = StoredForm(
            lambda name: checkpoint.tensors[name].read(),
            spec,
            Statistics.open(statistics),
            remembered,
        )
        storages = (SMALL, INT4, LARGE, INT8)
        groups = groups_of(spec)
        costs = measure_sensitivities(
            checkpoint, ids[:2], stored, storages, groups, lambda *_: None
        )
        searched, other = (
            Judge(str(DEMO), part, reference_logits(checkpoint, part), statistics, remembered)
            for part in (ids[2:4], ids[4:])
        )
    frontier = frontier_of(groups, shapes, costs)
    return Found(frontier, Chooser(frontier, lambda p: searched.plan(p.plan)), searched, other)


def test_smaller_than_int8_at_its_divergence(found: Found) -> None:
    alike = found.frontier.uniform(INT8)
    rounded = found.searched.rounded(alike.plan)
    # Two pieces are searched on: a tenth is room for what differs on other text.
    small = found.chooser.within_divergence(0.9 * rounded.divergence).plan
    assert found.on_other(small).size < 0.97 * rounded.size
    assert found.on_other(small).divergence < found.other.rounded(alike.plan).divergence


def test_no_worse_than_calibrated_int8(found: Found) -> None:
    """All int8 is nearly the best plan of its divergence: little is to be had, nothing lost."""
    alike = found.chooser.of(found.frontier.uniform(INT8))
    small = found.chooser.within_divergence(alike.measured.divergence)
    assert small.measured.size <= alike.measured.size
    assert small.measured.divergence <= alike.measured.divergence
    assert found.on_other(small.plan).divergence < 1.05 * found.on_other(alike.plan).divergence


@pytest.mark.parametrize(("storage", "share"), [(INT4, 1.0), (SMALL, 0.7)])
def test_better_than_calibrated_int4_at_its_size(
    storage: Storage, share: float, found: Found
) -> None:
    """Blocks of 32: 5 % on 24 pieces, where few plans are so small. Of 16: almost half."""
    alike = found.frontier.uniform(storage)
    size = found.chooser.of(alike).measured.size
    good = found.chooser.within_size(size).plan
    measured = found.on_other(good)
    assert measured.size <= size
    assert measured.divergence < share * found.on_other(alike).divergence
    assert measured.divergence < 0.7 * found.other.rounded(alike.plan).divergence
