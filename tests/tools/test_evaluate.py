"""`neo-eval`: what the harness finds of a bundle is what it finds of PyTorch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from helpers.harness_tasks import TASKS, write_tasks
from helpers.models import DEMO
from neo_export.exporter import ExportOptions, export_bundle
from neo_tools.evaluate.cli import main
from neo_tools.evaluate.gate import checks, verdict
from neo_tools.evaluate.paired import Score, difference, scores, tabulated
from neo_tools.evaluate.report import markdown, plain

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "int4"
    export_bundle(str(DEMO), folder, ExportOptions(target="cpu", precision="int4"))
    return folder


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


COMMANDS = {
    "report": "FP32 INT4 --reference DEMO --json --tasks " + ",".join(TASKS),
    "no task": "FP32 --tasks no_such",
    "no bundle": "NOWHERE --tasks last_word",
    "no checkpoint": "FP32 --tasks last_word --reference TASKS",
    "no id": "FP32 --tasks last_word --reference no/such/model",
    "no baseline": "FP32 --tasks last_word --max-drop 0.1",
    "nothing to check": "FP32 INT4 --tasks whole --limit 2 --quiet --max-drop 0.1",
    "gate": "FP32 INT4 --tasks last_word --limit 4 --quiet --max-drop -0.001",
}
PROGRAM = """
import contextlib, io, json, os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
from neo_tools.evaluate.cli import main
found = {}
for name, arguments in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    found[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(
    mini_bundle: Path, int4_bundle: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Of all commands, without a network; in one process of their own: the harness warns of much,
    and takes long to import."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    places = {"FP32": mini_bundle, "INT4": int4_bundle, "DEMO": DEMO, "TASKS": tasks}
    commands = {
        name: [
            *(str(places.get(word, word)) for word in line.split()),
            *("--include-path", str(tasks)),
        ]
        for name, line in COMMANDS.items()
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=tmp_path_factory.mktemp("nowhere"),
    )
    assert done.returncode == 0, done.stderr
    assert "git" not in done.stderr
    return {name: Outcome(*found) for name, found in json.loads(done.stdout).items()}


def test_float32_scores_what_pytorch_scores(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["report"].status == 0
    report = json.loads(outcomes["report"].out)
    assert report["baseline"] == f"PyTorch {DEMO.name}"
    found = {(one["task"], one["metric"]): one for one in report["scores"]}
    metrics = {
        (task, entry["metric"])
        for task in TASKS
        for entry in TASKS[task]["metric_list"]  # type: ignore[attr-defined]
    }
    assert found.keys() == metrics
    for one in found.values():
        exact, rounded = one["others"]
        assert exact["value"] == pytest.approx(one["value"], rel=1e-5)
        if exact["difference"] is not None:
            limit = 1e-5 * max(1, abs(math.log(one["value"] or 1)))
            assert abs(exact["difference"]["mean"]) <= limit
        assert rounded["model"] == "int4"
    assert found["which_end", "acc"]["value"] > 0.5, "the questions mean something"
    worse = found["last_word", "perplexity"]["others"][1]
    assert worse["difference"]["is_log"]
    assert worse["difference"]["mean"] == pytest.approx(
        math.log(worse["value"] / found["last_word", "perplexity"]["value"]), abs=1e-6
    )
    assert worse["difference"]["changed"] == 12


def test_a_gate(outcomes: dict[str, Outcome], mini_bundle: Path) -> None:
    gate = outcomes["gate"]
    assert gate.status == 1
    assert f"| last_word | acc ↑ | {mini_bundle.name} |" in gate.out
    assert "| | | int4 |" in gate.out
    assert "PAST last_word acc, int4: " in gate.out
    assert gate.out.endswith("NOT within all limits\n")
    assert "log-likelihoods: " in outcomes["report"].err
    assert "log-likelihoods: " not in gate.err


def test_a_gate_that_checks_nothing_is_closed(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["nothing to check"]
    assert found.status == 2
    assert "| whole | bits_per_byte ↓ |" in found.out, "what was measured is not lost"
    assert "--max-drop checks metrics that are means over samples and better if higher" in found.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no task", "there is no task no_such; `lm_eval ls tasks`"),
        ("no bundle", "NOWHERE"),
        ("no baseline", "--max-drop needs a baseline: give it"),
        ("no checkpoint", "cannot be loaded"),
        ("no id", "the reference no/such/model cannot be loaded"),
    ],
)
def test_what_cannot_be_run(outcomes: dict[str, Outcome], name: str, message: str) -> None:
    found = outcomes[name]
    assert (found.status, found.out) == (2, "")
    assert found.err.splitlines()[-1].startswith("neo-eval: ")
    assert message in found.err.splitlines()[-1]


def results(values: list[float], value: float, metric: str = "acc") -> dict[str, Any]:
    return {
        "results": {"task": {"alias": "task", f"{metric},none": value, f"{metric}_stderr,none": 9}},
        "higher_is_better": {"task": {metric: metric == "acc"}},
        "samples": {
            "task": [
                {"doc_id": number, "filter": "none", metric: one}
                for number, one in enumerate(values)
            ]
        },
    }


def test_a_task_decodes_greedily_unless_it_asks_to_sample() -> None:
    """As the harness's HFLM, whatever the defaults in a bundle's generation_config.json are."""
    from neo_tools.evaluate.lm import NeoLM

    harness = object.__new__(NeoLM)
    harness._max_gen_toks = 20
    greedy = {"do_sample": False, "max_new_tokens": 20, "stop": ["\n"]}
    for asked in ({}, {"temperature": 0.7}, {"temperature": 0.0, "do_sample": True, "top_p": 0.9}):
        assert harness._options({"until": "\n", **asked}) == greedy
    sampled = harness._options({"until": [], "do_sample": True, "temperature": 0.7})
    assert sampled == {"do_sample": True, "temperature": 0.7, "max_new_tokens": 20, "stop": []}


def test_differences_are_paired() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    first = generator.integers(0, 2, 50).astype(float)
    second = np.where(generator.random(50) < 0.1, 1 - first, first)
    one, other = (results(list(row), row.mean()) for row in (first, second))
    [score] = scores(one)
    assert score == Score(
        task="task",
        metric="acc",
        filter="none",
        value=first.mean(),
        error=pytest.approx(first.std(ddof=1) / math.sqrt(50)),
        higher_is_better=True,
        samples=50,
    )
    found = difference(one, other, score)
    assert found is not None
    apart = second - first
    assert found.mean == pytest.approx(apart.mean())
    assert found.error == pytest.approx(apart.std(ddof=1) / math.sqrt(50))
    assert found.changed == np.count_nonzero(apart) > 0
    table = tabulated({"a": one, "b": other})
    for drop in (-apart.mean(), 0.5, -0.5, 0.0):
        [check] = checks(table, drop)
        assert (check.task, check.metric, check.model) == ("task", "acc", "b")
        assert check.found == found.mean
        assert check.passed == (apart.mean() >= -drop), "also what must be better"
        said = verdict([check])
        assert said.startswith("ok   task acc, b: " if check.passed else "PAST task acc, b: ")
        assert said.endswith(
            "\n\nwithin all limits\n" if check.passed else "NOT within all limits\n"
        )
        assert plain(table, "a", [check])["passed"] == check.passed
    assert "passed" not in plain(table, "a"), "without a limit there is no verdict"
    assert f"| | | b | {second.mean():.4f} ±" in markdown(table, "a")
    json.dumps(plain(table, "a"))


def test_perplexities_are_compared_by_their_logarithm() -> None:
    one = results([-1.0, -2.0, -3.0], math.exp(2.0), "perplexity")
    other = results([-1.5, -2.0, -3.1], math.exp(2.2), "perplexity")
    [score] = scores(one)
    assert score.error == pytest.approx(math.exp(2.0) / math.sqrt(3))
    found = difference(one, other, score)
    assert found is not None
    assert found.is_log
    assert found.mean == pytest.approx(0.2)
    assert found.changed == 2
    assert checks(tabulated({"a": one, "b": other}), 0.5) == [], "it has another unit"


def test_what_is_no_mean_has_no_difference() -> None:
    one = results([1.0, 2.0], 7.0, "f1")
    [score] = scores(one)
    assert score.error is None
    assert difference(one, one, score) is None
    fewer = results([1.0], 1.5)
    [mean] = scores(results([1.0, 2.0], 1.5))
    assert difference(results([1.0, 2.0], 1.5), fewer, mean) is None
    assert "| task | f1 ↓ | a | 7.0000 | | |" in markdown(tabulated({"a": one}), "a")


def test_wrong_usage(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(mini_bundle)], "--tasks"),
        ([str(mini_bundle), "--tasks", "a", "--limit", "0"], "0 is too small, expected at least 1"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments)
        assert message in capsys.readouterr().err
    assert main([str(mini_bundle), str(mini_bundle), "--tasks", "last_word"]) == 2
    assert "a bundle is named twice" in capsys.readouterr().err
