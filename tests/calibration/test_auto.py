"""`--auto`: the frontier, the plan that keeps a limit, and what it is worth on other text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.graphs import spec_of
from helpers.held_out import held_out_ids
from helpers.models import DEMO, TinyConfig
from neo_calibration.auto.choose import Chooser
from neo_calibration.auto.judge import Judge, Measured
from neo_calibration.auto.picture import to_svg
from neo_calibration.auto.report import Point
from neo_calibration.auto.search import Frontier, FrontierPlan, frontier_of
from neo_calibration.auto.sensitivity import groups_of, measure_sensitivities, reference_logits
from neo_calibration.auto.stored_form import StoredForm
from neo_calibration.cli import main as calibrate
from neo_export.checkpoint import expected_shapes, open_checkpoint
from neo_export.cli import main as export
from neo_export.quantize.plan import Storage, WeightPlan, is_planned
from neo_export.statistics import Statistics
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = TinyConfig()
SPEC = spec_of(CONFIG)
SHAPES = expected_shapes(SPEC)
MATRICES = [name for name, shape in SHAPES.items() if is_planned(name, shape)]
INT8, INT4 = Storage("int8"), Storage("int4", 16)


def synthetic_frontier(seed: int = 0) -> Frontier:
    generator = np.random.default_rng(seed)
    divergences = {}
    for group in groups_of(SPEC):
        cost = float(generator.lognormal())
        divergences |= {(group, INT8): 0.01 * cost, (group, INT4): cost}
    return frontier_of(groups_of(SPEC), SHAPES, divergences)


def test_groups_cover_every_matrix_once() -> None:
    names = [name for group in groups_of(SPEC) for name in group.names]
    assert sorted(names) == sorted(MATRICES)
    untied = spec_of(TinyConfig(tie_word_embeddings=False))
    names = [name for group in groups_of(untied) for name in group.names]
    assert "lm_head.weight" in names


def test_the_frontier_goes_down_in_size_and_up_in_divergence() -> None:
    frontier = synthetic_frontier()
    sizes = [plan.size for plan in frontier.plans]
    costs = [plan.divergence for plan in frontier.plans]
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)
    first, last = frontier.plans[0].plan, frontier.plans[-1].plan
    assert first.kinds(MATRICES) == {"fp32"}
    assert last.kinds(MATRICES) == {"int4"}
    for plan in frontier.plans:
        assert plan.size == plan.plan.bytes_of(SHAPES)
        for layer in range(2):  # they are one product
            parts = [f"transformer.h.{layer}.attn.attention.{p}_proj.weight" for p in "qkv"]
            assert plan.plan.packs(parts)


def test_no_plan_beats_the_frontier() -> None:
    """Among all assignments of a small model's groups, none is smaller and better."""
    generator = np.random.default_rng(1)
    groups = groups_of(SPEC)[:5]
    divergences = {}
    for group in groups:
        cost = float(generator.lognormal())
        divergences |= {(group, INT8): 0.01 * cost, (group, INT4): cost}
    frontier = frontier_of(groups, SHAPES, divergences)

    def size(group: int, storage: Storage) -> int:
        return sum(storage.bytes_of(*SHAPES[name]) for name in groups[group].names)

    choices = [Storage("fp32"), INT8, INT4]
    for code in range(3 ** len(groups)):
        picked = [choices[code // 3**i % 3] for i in range(len(groups))]
        total = sum(size(i, storage) for i, storage in enumerate(picked))
        cost = sum(
            divergences.get((group, storage), 0.0)
            for group, storage in zip(groups, picked, strict=True)
        )
        for plan in frontier.plans:
            assert not (total < plan.size and cost < plan.divergence - 1e-12)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_measured_divergence_decides(factor: float) -> None:
    """However far the estimate is off, what is chosen holds, and its successor does not."""
    frontier = synthetic_frontier()
    known = {plan.plan: plan for plan in frontier.plans}

    def measure(plan: WeightPlan) -> Measured:
        found = factor * known[plan].divergence
        return Measured(known[plan].size + 1000, found, (found, found))

    for limit in (0.05, 0.5, 3.0):
        chosen = Chooser(frontier, measure).within_divergence(limit)
        assert chosen.measured.divergence <= limit
        place = frontier.plans.index(chosen.plan)
        following = frontier.plans[place + 1 :]
        assert not following or factor * following[0].divergence > limit
    limit = frontier.plans[4].size + 1000
    chosen = Chooser(frontier, measure).within_size(limit)
    assert chosen.plan == frontier.plans[4]
    with pytest.raises(RequestError, match="the smallest plan has"):
        Chooser(frontier, measure).within_size(frontier.plans[-1].size)


def test_a_limit_that_cannot_be_kept() -> None:
    plans = (FrontierPlan(WeightPlan(Storage("fp32")), 100, 0.0),)
    chooser = Chooser(Frontier(plans), lambda _: Measured(100, 1e-3, (1e-3, 1e-3)))
    with pytest.raises(RequestError, match=r"already at 0\.001 nats"):
        chooser.within_divergence(1e-4)


def test_picture() -> None:
    points = [
        Point("int8", "rounded", 2_000_000, 2e-3, (1e-3, 3e-3)),
        Point("plan 3", "auto", 1_500_000, 2e-3, (1e-3, 3e-3)),
        Point("plan 9", "auto", 1_000_000, 2e-2, None),
    ]
    text = to_svg(points, "a < b")
    assert text.count("<circle") == 2 + 1  # and the legend's
    assert "int8: 2.000 MB, 0.002 nats" in text
    assert "a &lt; b" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auto"], "--auto needs a limit"),
        (["--auto", "--max-kl", "0.01"], "--auto needs text to measure on"),
        (["--int8", "--max-kl", "0.01"], "--max-kl was given, it goes with --auto"),
        (["--int4", "--auto-report", "r"], "--auto-report was given, it goes with --auto"),
    ],
)
def test_command_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(DEMO), "-o", str(tmp_path / "bundle"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_against_uniform_bundles(tmp_path: Path) -> None:
    """Smaller than int8 at its divergence, better than int4 at its size: on text of its own."""
    lines = (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(lines[-120:]), encoding="utf-8")
    stats = tmp_path / "stats"
    assert calibrate([str(DEMO), "--text", str(text), "-o", str(stats), "--tokens", "8192"]) == 0
    remembered = tmp_path / "remembered"
    remembered.mkdir()
    ids = held_out_ids(8, 512)
    with open_checkpoint(DEMO) as checkpoint:
        spec, shapes = checkpoint.spec, expected_shapes(checkpoint.spec)
        stored = StoredForm(
            lambda name: checkpoint.tensors[name].read(), spec, Statistics.open(stats), remembered
        )
        candidates = (Storage("int4", 64), Storage("int4", 32), Storage("int8"))
        found = measure_sensitivities(checkpoint, ids[:2], stored, candidates, lambda *_: None)
        frontier = frontier_of(groups_of(spec), shapes, found)
        searched, other = (
            Judge(str(DEMO), part, reference_logits(checkpoint, part), stats, remembered)
            for part in (ids[2:4], ids[4:])
        )
    int8 = searched.uniform("int8", None, calibrated=False)
    int4 = searched.uniform("int4", 32, calibrated=False)
    chooser = Chooser(frontier, searched.plan)
    small = chooser.within_divergence(0.95 * int8.divergence).plan.plan
    good = chooser.within_size(int4.size).plan.plan
    assert other.plan(small).size < 0.97 * int8.size
    assert other.plan(small).divergence < other.uniform("int8", None, calibrated=False).divergence
    assert other.plan(good).size <= int4.size
    rounded = other.uniform("int4", 32, calibrated=False)
    assert other.plan(good).divergence < 0.7 * rounded.divergence
