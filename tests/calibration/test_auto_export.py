"""`neo-export --auto` from end to end, on a small model: search, export, report, interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
from helpers.models import DEMO, TinyConfig, make_checkpoint
from neo_calibration.cli import main as calibrate
from neo_export.command.cli import main as export
from neo_export.command.run_calibration import _summary
from neo_export.quantize import gptq_quantizer, migration_search
from neo_export.quantize.plan import WeightPlan
from neo_runtime.errors import StatisticsError

if TYPE_CHECKING:
    from pathlib import Path

KEPT = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the demo model's tokenizer."""
    config = TinyConfig(vocab_size=4096, max_position_embeddings=64)
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), config)
    shutil.copy(DEMO / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def command(model: Path, last_stories: Path) -> list[str]:
    """All but where to write, and the limit."""
    stats = model.with_name("stats")
    text = str(last_stories)
    assert calibrate([str(model), "--text", text, "-o", str(stats), "--tokens", "2048"]) == 0
    return [str(model), "--auto", "--calibrate-text", text, "--calibration", str(stats)]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this process and of those that it starts."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def never(*_arguments: Any) -> None:
    raise AssertionError("what the search has decided is decided again")


def test_a_bundle_within_the_limit(
    command: list[str],
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gptq_quantizer, "gptq", never)  # here; the search is another process
    monkeypatch.setattr(migration_search, "_search", never)
    bundle, report = tmp_path / "bundle", tmp_path / "report"
    options = ["--max-size", "0.2", "--keep-fp32", KEPT, "--auto-report", str(report), "--json"]
    assert export([*command, "-o", str(bundle), *options]) == 0
    out, err = capfd.readouterr()
    summary = json.loads(out)
    assert summary["precision"] == "mixed"
    found = summary["auto"]
    assert found["weight_bytes"] == summary["weight_bytes"] <= found["limit"]["max_size"]
    assert found["interval"][0] <= found["divergence"] <= found["interval"][1]
    assert f": {found['weight_bytes']:,} bytes, {found['divergence']:.3g} nats" in err
    assert sorted(file.name for file in report.iterdir()) == ["auto.json", "auto.svg", "plan.json"]
    assert WeightPlan.read(report / "plan.json").of(KEPT).kind == "fp32"
    points = json.loads((report / "auto.json").read_text())["points"]
    [chosen] = [point for point in points if point["name"] == "chosen"]
    assert (chosen["size"], chosen["divergence"]) == (found["weight_bytes"], found["divergence"])
    assert {point["kind"] for point in points} == {"auto", "calibrated", "rounded"}
    assert not list(scratch.iterdir())
    with neo_runtime.load(bundle) as loaded:
        assert loaded.logits([1, 2, 3]).shape == (3, 4096)


def test_a_limit_that_cannot_be_kept(
    command: list[str], tmp_path: Path, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-size", "1000", "--auto-report", str(tmp_path / "report")]
    assert export([*command, "-o", str(tmp_path / "bundle"), *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "neo-auto: --max-size 1000 allows 1,000 bytes" in err
    assert "measuring" not in err, "nothing long is run for nothing"
    assert "see its message above" in err
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("limit", "stories", "said"),
    [
        ("--max-size=1000", None, "--max-size 1000 allows 1,000 bytes"),
        ("--max-kl=0.1", 2, "tokens, too few for two parts of 4096 to measure on; give more text"),
    ],
)
def test_what_no_search_can_do_is_told_before_the_calibration(
    limit: str,
    stories: int | None,
    said: str,
    model: Path,
    last_stories: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(last_stories.read_text().splitlines(keepends=True)[:stories]))
    command = [str(model), "--auto", limit, "--calibrate-text", str(text)]
    assert export([*command, "-o", str(tmp_path / "bundle")]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert "neo-calibrate" not in err
    assert err.count("\n") == 2, "what the search said, and that it failed"


def test_a_search_that_is_ended_leaves_nothing(
    command: list[str], tmp_path: Path, scratch: Path
) -> None:
    line = [sys.executable, "-m", "neo_export.command.cli", *command]
    line += ["-o", str(tmp_path / "bundle")]
    with subprocess.Popen([*line, "--max-kl", "0.001"], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for said in child.stderr:
            if "bundle 1: estimated" in said:
                break
        child.terminate()  # it alone: what it started is its own to end
        child.stderr.read()  # to the end of all that write there
    assert child.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not list(scratch.iterdir())


def test_a_summary_is_found_behind_the_chatter_of_libraries() -> None:
    assert _summary('downloading {model} …\n{"bundles": 3}\n') == {"bundles": 3}


@pytest.mark.parametrize("said", ["", "no summary", "{half"])
def test_no_summary_is_an_error_that_quotes_what_was_said(said: str) -> None:
    with pytest.raises(StatisticsError, match="expected a JSON summary"):
        _summary(said)
