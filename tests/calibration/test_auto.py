"""`--auto`: the frontier, the plan that keeps a limit, the picture, and the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.graphs import spec_of
from helpers.models import DEMO, TinyConfig
from neo_calibration.auto import run
from neo_calibration.auto.choose import Chooser
from neo_calibration.auto.curve import Point
from neo_calibration.auto.judge import Measured
from neo_calibration.auto.picture import to_svg
from neo_calibration.auto.search import Frontier, FrontierPlan, frontier_of
from neo_calibration.auto.sensitivity import groups_of
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.command.cli import main as export
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.plan import Storage, is_planned
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_export.checkpoint.whole import Checkpoint

CONFIG = TinyConfig()
SPEC = spec_of(CONFIG)
SHAPES = expected_shapes(SPEC)
MATRICES = [name for name, shape in SHAPES.items() if is_planned(name, shape)]
INT8, INT4 = Storage("int8"), Storage("int4", 16)
AUTO = ["--auto", "--calibrate-text", "text.txt"]


def synthetic_frontier(seed: int = 0) -> Frontier:
    generator = np.random.default_rng(seed)
    divergences = {}
    for group in groups_of(SPEC):
        cost = float(generator.lognormal())
        divergences |= {(group, INT8): 0.01 * cost, (group, INT4): cost}
    return frontier_of(groups_of(SPEC), SHAPES, divergences)


def plans_of(frontier: Frontier) -> list[FrontierPlan]:
    return [frontier.at(index) for index in range(len(frontier))]


def test_groups_cover_every_matrix_once() -> None:
    names = [name for group in groups_of(SPEC) for name in group.names]
    assert sorted(names) == sorted(MATRICES)
    untied = spec_of(TinyConfig(tie_word_embeddings=False))
    names = [name for group in groups_of(untied) for name in group.names]
    assert "lm_head.weight" in names


def test_groups_leave_out_what_stays_float32() -> None:
    groups = groups_of(SPEC, ("*.k_proj.weight", "*.h.1.mlp.*", "*wte*"))
    names = [name for group in groups for name in group.names]
    assert not any("k_proj" in name or "h.1.mlp" in name or "wte" in name for name in names)
    assert len(names) == len(MATRICES) - 2 - 2 - 1
    divergences = {(group, INT4): 1.0 for group in groups}
    smallest = plans_of(frontier_of(groups, SHAPES, divergences))[-1]
    assert {name for name in MATRICES if smallest.plan.of(name).kind == "fp32"} == set(
        MATRICES
    ) - set(names)
    assert smallest.size == smallest.plan.bytes_of(SHAPES)


def test_the_frontier_goes_down_in_size_and_up_in_divergence() -> None:
    frontier = synthetic_frontier()
    plans = plans_of(frontier)
    sizes = [plan.size for plan in plans]
    costs = [plan.divergence for plan in plans]
    assert sizes == sorted(sizes, reverse=True) == frontier.sizes.tolist()
    assert costs == sorted(costs)
    np.testing.assert_allclose(costs, frontier.divergences, rtol=1e-12)
    assert plans[0].plan.kinds(MATRICES) == {"fp32"}
    assert plans[-1].plan.kinds(MATRICES) == {"int4"}
    for plan in plans:
        assert plan.size == plan.plan.bytes_of(SHAPES)
        for layer in range(2):  # they are one product
            parts = [f"transformer.h.{layer}.attn.attention.{p}_proj.weight" for p in "qkv"]
            assert plan.plan.packs(parts)
    for limit in (sizes[0], sizes[5], sizes[5] - 1):
        assert sizes[frontier.first_fitting(limit)] == next(s for s in sizes if s <= limit)
    for budget in (0.0, costs[7], costs[-1]):
        assert costs[frontier.last_within(budget)] == max(c for c in costs if c <= budget)


def test_the_frontier_is_every_pareto_optimal_plan() -> None:
    """Of all assignments of some groups: those that none of as few bytes is as good as."""
    groups = groups_of(SPEC)[:6]
    generator = np.random.default_rng(1)
    divergences = {}
    for group in groups:
        cost = float(generator.lognormal())
        divergences |= {(group, INT8): 0.01 * cost, (group, INT4): cost}
    choices = [Storage("fp32"), INT8, INT4]

    def size(group: int, storage: Storage) -> int:
        return sum(storage.bytes_of(*SHAPES[name]) for name in groups[group].names)

    found = []
    for code in range(3 ** len(groups)):
        picked = list(enumerate(choices[code // 3**i % 3] for i in range(len(groups))))
        cost = sum(divergences.get((groups[i], storage), 0.0) for i, storage in picked)
        found.append((sum(size(i, storage) for i, storage in picked), cost))
    best: list[tuple[int, float]] = []
    for total, cost in sorted(found):
        if not best or cost < best[-1][1] - 1e-12:
            best.append((total, cost))
    frontier = frontier_of(groups, SHAPES, divergences)
    kept = sum(4 * int(np.prod(SHAPES[n])) for n in MATRICES) - sum(
        size(i, Storage("fp32")) for i in range(len(groups))
    )
    assert frontier.sizes[::-1].tolist() == [total + kept for total, _ in best]
    np.testing.assert_allclose(frontier.divergences[::-1], [cost for _, cost in best], atol=1e-12)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_measured_divergence_decides(factor: float) -> None:
    """However far the estimate is off, what is chosen holds, and much smaller ones do not."""
    frontier = synthetic_frontier()
    plans = plans_of(frontier)

    def measure(plan: FrontierPlan) -> Measured:
        found = factor * plan.divergence
        return Measured(plan.size + 1000, found, (found, found))

    for limit in (0.05, 0.5, 3.0):
        chosen = Chooser(frontier, measure).within_divergence(limit)
        assert chosen.measured.divergence <= limit
        smaller = [p for p in plans if p.size < 0.99 * chosen.plan.size]
        assert not smaller or factor * smaller[0].divergence > limit
    limit = plans[4].size + 1000
    chosen = Chooser(frontier, measure).within_size(limit)
    assert chosen.plan == plans[4]
    with pytest.raises(RequestError, match="the smallest bundle has"):
        Chooser(frontier, measure).within_size(plans[-1].size)
    with pytest.raises(
        RequestError, match="the most accurate bundle already has a divergence of 1 nats"
    ):
        Chooser(frontier, lambda plan: Measured(plan.size, 1.0, (1, 1))).within_divergence(1e-4)


def test_bundles_with_all_matrices_alike_compete() -> None:
    """The estimate says that a mixture is better; the bundle says that it is not."""
    frontier = synthetic_frontier()
    alike = frontier.uniform(INT8)

    def measure(plan: FrontierPlan) -> Measured:
        found = plan.divergence * (0.8 if plan == alike else 1.5)
        return Measured(plan.size + frontier.rest, found, (found, found))

    size = alike.size + frontier.rest
    assert Chooser(frontier, measure).within_size(size).plan == alike
    smallest = Chooser(frontier, measure).within_divergence(0.8 * alike.divergence).plan
    assert smallest.size <= alike.size


def test_picture() -> None:
    points = [
        Point("int8", "rounded", 2_000_000, 2e-3, (1e-3, 3e-3)),
        Point("plan 3", "auto", 1_500_000, 2e-3, (1e-3, 3e-3)),
        Point("plan 9", "auto", 1_000_000, 2e-2, None),
        Point("plan 8", "auto", 1_200_000, 3e-2, None),
        Point("int4:32", "calibrated", 1_100_000, 1e-2, None),
    ]
    text = to_svg(points, "a < b")
    assert text.count("<circle") == 3 + 1  # and the legend's
    assert "int8: 2.000 MB, 0.002 nats" in text
    assert "a &lt; b" in text
    [line] = re.findall(r'<path d="([^"]*)"', text)
    assert len(re.findall("[ML]", line)) == 3, (
        "through what is neither beaten nor without statistics"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auto"], "--auto needs a limit"),
        (["--auto", "--max-kl", "0.01"], "--auto needs text to measure on"),
        (["--int8", "--max-kl", "0.01"], "--max-kl can only be used with --auto"),
        (["--int4", "--auto-report", "r"], "--auto-report can only be used with --auto"),
        ([*AUTO, "--max-kl", "0"], "--max-kl is 0, expected a finite number of nats above 0"),
        ([*AUTO, "--max-size", "-3"], "--max-size is '-3', expected bytes, or a fraction"),
        ([*AUTO, "--max-size", "1", "--target", "cuda"], "--auto measures bundles for the CPU"),
        (
            [*AUTO, "--max-size", "1", "--int8-prefill"],
            "--int8-prefill cannot be combined with --auto",
        ),
        ([*AUTO, "--max-size", "1", "--auto-report", __file__], "is not a folder"),
    ],
)
def test_command_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(DEMO), "-o", str(tmp_path / "bundle"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_bundles_that_are_measured_have_the_adapters_base(
    statistics: Path, last_stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are exported from the name of the model, as the search opened it."""
    opened = []

    def open_it(model: str, base: str | None, tokenizer: str | None) -> Checkpoint:
        opened.append((base, tokenizer))
        return open_checkpoint(model)

    def judge(*_: object, base: str | None, **_options: object) -> None:
        raise RequestError(f"judged on {base}")

    monkeypatch.setattr(run, "open_model", open_it)
    monkeypatch.setattr(run, "Judge", judge)
    for name in ("_sensitivities", "frontier_of", "reference_logits"):
        monkeypatch.setattr(run, name, lambda *_: None)
    options = run.AutoOptions(
        text=(last_stories,),
        base="there",
        tokenizer="elsewhere",
        max_size="0.5",
        statistics=statistics,
        output=tmp_path / "plan.json",
    )
    with pytest.raises(RequestError, match="judged on there"):
        run.run_auto(str(DEMO), options, lambda *_: None)
    assert opened == [("there", "elsewhere")]
