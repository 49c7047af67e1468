"""Activation outliers moved into the weights: the same function, and int8 that stays usable."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.held_out import held_out_ids, perplexity
from helpers.models import DEMO, Reference
from helpers.outliers import constant_checkpoint, spread_outliers
from helpers.rounding import rounded_to_nearest
from helpers.running import Graphs, relative_l2
from neo_calibration.cli import main as calibrate
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.comparison.metrics import kl_divergence
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.gpt_neo.parameters import LAYER_INPUTS
from neo_export.quantize import migration_search
from neo_export.quantize.migration import Migration
from neo_export.quantize.migration_search import MovedPlace, Rounding, find_migration
from neo_export.statistics.folder import Statistics
from neo_export.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

PIECES, LENGTH = 16, 512
"""Of the first stories; calibration is on the last ones."""
WITHIN = 0.01
"""Relative increase of perplexity that is allowed with calibration."""
RUINED = 0.10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread_outliers(DEMO, tmp_path_factory.mktemp("outliers") / "checkpoint")


def _statistics(checkpoint: Path, folder: Path) -> Path:
    lines = (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    text = folder / "text.jsonl"
    text.write_text("\n".join(lines[-120:]), encoding="utf-8")
    command = [str(checkpoint), "--text", str(text), "-o", str(folder / "stats")]
    assert calibrate([*command, "--tokens", "8192"]) == 0
    return folder / "stats"


@pytest.fixture(scope="module")
def statistics(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _statistics(checkpoint, tmp_path_factory.mktemp("statistics"))


def score(bundle: Path) -> float:
    graphs = Graphs(bundle)
    return perplexity(lambda ids: graphs.run("score", ids[None])[0], held_out_ids(PIECES, LENGTH))


def exact(reference: Reference) -> float:
    return perplexity(lambda ids: reference.logits(ids[None])[0], held_out_ids(PIECES, LENGTH))


def test_the_outliers_are_real_and_everywhere(
    checkpoint: Path, statistics: Path, reference: Reference
) -> None:
    """Same function; each input of each layer has outliers, on other channels in each layer."""
    assert exact(Reference(checkpoint)) == pytest.approx(exact(reference), rel=1e-5)
    found = Statistics.open(statistics).places
    for kind in LAYER_INPUTS:
        channels = [set(found[f"transformer.h.{i}.{kind}"].outlier_channels) for i in range(4)]
        assert all(channels), kind
        if kind != "gelu":  # there they are the units that were added
            assert len(set.intersection(*channels)) == 0, kind


@pytest.fixture
def rounded() -> Iterator[None]:
    """GPTQ would make up for a part of what is tested here."""
    with rounded_to_nearest():
        yield


@pytest.mark.usefixtures("rounded")
def test_int8_comes_back(
    checkpoint: Path,
    statistics: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the outliers of every kind of place matter: without moving one kind, it does not."""
    expected, found = exact(reference), []

    def find(*arguments: Any) -> tuple[Migration, tuple[MovedPlace, ...]]:
        found.append(find_migration(*arguments))
        return found[0]

    monkeypatch.setattr("neo_export.decisions.calibrated.find_migration", find)
    options = ExportOptions(precision="int8", calibration=statistics, verify=True)
    summary = export_bundle(str(checkpoint), tmp_path / "calibrated", options)
    assert score(tmp_path / "calibrated") < (1 + WITHIN) * expected
    assert len(summary.moved_places) == 16
    assert all(place.error_after < 0.3 * place.error_before for place in summary.moved_places)
    export_bundle(str(checkpoint), tmp_path / "naive", ExportOptions(precision="int8"))
    assert score(tmp_path / "naive") > (1 + RUINED) * expected
    [(migration, _)] = found
    for kind in LAYER_INPUTS:
        scales, shifts = (
            {place: values for place, values in every.items() if not place.endswith(kind)}
            for every in (migration.scales, migration.shifts)
        )
        without = Migration(scales, shifts)
        monkeypatch.setattr(
            "neo_export.decisions.calibrated.find_migration", lambda *_, m=without: (m, ())
        )
        options = ExportOptions(precision="int8", calibration=statistics)
        export_bundle(str(checkpoint), tmp_path / kind, options)
        assert score(tmp_path / kind) > (1 + WITHIN) * expected, kind


@pytest.mark.parametrize("value", [30.0, 1000.0, 3000.0])
def test_a_constant_of_any_size_goes_into_the_bias(
    value: float, reference: Reference, tmp_path: Path
) -> None:
    """What a bias cancels excuses no error; moments about it are differences of large numbers."""
    checkpoint = constant_checkpoint(DEMO, tmp_path / "checkpoint", value)
    statistics = _statistics(checkpoint, tmp_path)
    expected = exact(reference)
    for precision, most in (("int8", WITHIN), ("int4", 0.06)):
        options = ExportOptions(precision=precision, calibration=statistics)
        summary = export_bundle(str(checkpoint), tmp_path / precision, options)
        assert {f"transformer.h.{layer}.ln_2" for layer in range(4)} <= {
            moved.place for moved in summary.moved_places
        }
        assert score(tmp_path / precision) < (1 + most) * expected


@pytest.fixture(scope="module")
def of_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _statistics(DEMO, tmp_path_factory.mktemp("statistics"))


@pytest.mark.usefixtures("rounded")
def test_a_model_without_outliers_is_left_alone(
    of_the_demo: Path, reference: Reference, tmp_path: Path
) -> None:
    export_bundle(str(DEMO), tmp_path / "plain", ExportOptions(precision="int8"))
    options = ExportOptions(precision="int8", calibration=of_the_demo)
    summary = export_bundle(str(DEMO), tmp_path / "calibrated", options)
    assert summary.moved_places == ()
    # What else statistics are used for (GPTQ) may only bring the bundle nearer.
    far, near = (divergence(tmp_path / name, reference) for name in ("plain", "calibrated"))
    assert near <= far


def never(*_arguments: Any) -> None:
    raise AssertionError("a place that is remembered is searched again")


def test_what_is_remembered_is_what_was_found(
    checkpoint: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With outliers, so that scales and shifts are kept, and for one storage at a time."""
    remembered = tmp_path / "remembered"
    remembered.mkdir()
    search, opened = migration_search._search, Statistics.open(statistics)

    def find(block: int | None, folder: Path | None) -> tuple[Migration, tuple[MovedPlace, ...]]:
        return find_migration(read, spec, opened, lambda _: Rounding(block), None, folder)

    with open_checkpoint(checkpoint) as opened_checkpoint:
        spec = replace(opened_checkpoint.spec, num_layers=1)  # is enough

        def read(name: str) -> NDArray[np.float32]:
            return opened_checkpoint.tensors[name].read()

        for block in (None, 16):
            expected, moved = find(block, None)
            assert find(block, remembered)[1] == moved
            monkeypatch.setattr(migration_search, "_search", never)
            found, again = find(block, remembered)
            monkeypatch.setattr(migration_search, "_search", search)
            assert again == moved
            assert found.scales.keys() == expected.scales.keys()
            assert found.shifts.keys() == expected.shifts.keys()
            for place, scale in expected.scales.items():
                np.testing.assert_array_equal(found.scales[place], scale)
            for place, shift in expected.shifts.items():
                np.testing.assert_array_equal(found.shifts[place], shift)
        assert expected.shifts


def divergence(bundle: Path, reference: Reference) -> float:
    """Mean KL divergence from PyTorch's float32, nats a position."""
    graphs = Graphs(bundle)
    pieces = held_out_ids(PIECES, LENGTH)[:, None]
    found = [kl_divergence(reference.logits(p)[0], graphs.run("score", p)[0]) for p in pieces]
    return float(np.mean(found))


@pytest.fixture(scope="module")
def drawn() -> Migration:
    """Random scales and shifts at every place of the demo model."""
    generator = np.random.default_rng(0)
    scales, shifts = {}, {}
    for layer in range(4):
        for kind in LAYER_INPUTS:
            place, width = f"transformer.h.{layer}.{kind}", 768 if kind == "gelu" else 192
            scales[place] = np.exp(generator.normal(size=width)).astype(np.float32)
            if kind != "ln_1":
                shifts[place] = generator.normal(size=width).astype(np.float32)
    return Migration(scales, shifts)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_the_function_stays_the_same(
    target: str,
    drawn: Migration,
    of_the_demo: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any scales and shifts, unrounded: the graphs equal PyTorch on the untouched checkpoint."""
    monkeypatch.setattr("neo_export.decisions.calibrated.find_migration", lambda *_: (drawn, ()))
    options = ExportOptions(target=target, calibration=of_the_demo)
    export_bundle(str(DEMO), tmp_path / "bundle", options)
    ids = held_out_ids(1, 200)
    found = Graphs(tmp_path / "bundle").run("score", ids)
    assert relative_l2(found, reference.logits(ids)).max() <= 10 * TOLERANCES["fp32"].logits
    model = (tmp_path / "bundle" / "score.onnx").read_bytes()
    assert model.count(b"c_proj.weight.inverse_scale") >= 4


def test_what_is_stored_is_restored(drawn: Migration) -> None:
    with open_checkpoint(DEMO) as checkpoint:

        def read(name: str) -> NDArray[np.float32]:
            return checkpoint.tensors[name].read()

        stored = drawn.reading(read)
        restored = drawn.restoring(stored)
        changed = 0
        for name in checkpoint.tensors:
            values = read(name)
            changed += not np.array_equal(stored(name), values)
            scale = np.abs(values).max() + 10
            assert np.abs(restored(name) - values).max() <= 1e-5 * scale, name
        # Both norms' weight and bias, six matrices and three of their biases, in four layers.
        assert changed == 4 * (4 + 6 + 3)


def test_second_moments_follow(drawn: Migration) -> None:
    generator = np.random.default_rng(1)
    place = "transformer.h.2.ln_2"
    x = generator.normal(size=(1000, 192)).astype(np.float32) + 1
    moved = (x - drawn.shifts[place]) / drawn.scales[place]
    moments = (x.T @ x / len(x), x.mean(axis=0))
    found = drawn.second_moment(place, moments)
    expected = moved.T @ moved / len(x)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    other = "transformer.h.9.ln_2"
    assert drawn.second_moment(other, moments) is moments[0]
