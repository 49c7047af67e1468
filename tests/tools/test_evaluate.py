"""`neo-eval`: what the harness finds of a bundle is what it finds of PyTorch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from helpers.hf_reference import heldout_texts
from helpers.models import DEMO
from neo_export.exporter import ExportOptions, export_bundle
from neo_tools.evaluate.cli import main
from neo_tools.evaluate.paired import Score, difference, scores
from neo_tools.evaluate.report import markdown, plain, tabulated, worst_drop

if TYPE_CHECKING:
    from pathlib import Path

TASKS = {
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "which_end": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "sentence": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{ends[0]}}",
        "generation_kwargs": {"until": [".", "\n"], "do_sample": False, "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four kinds of tasks over held-out text; some contexts are longer than the model."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = heldout_texts()
    documents = []
    for number in range(12):
        text = " ".join((texts[number] * 9).split()[: 700 if number == 5 else 40 + 7 * number])
        ends = [text.rsplit(" ", 1)[1], "elephant and", "yes", "no"]
        ends = [f" {end}" for end in ends]
        documents.append({"text": text.rsplit(" ", 1)[0], "ends": ends, "gold": 0})
    data = folder / "documents.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    for name, task in TASKS.items():
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(shared | task))
    return folder


@pytest.fixture(scope="module")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "int4"
    export_bundle(str(DEMO), folder, ExportOptions(target="cpu", precision="int4"))
    return folder


@pytest.fixture(scope="module")
def report(
    mini_bundle: Path, int4_bundle: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of PyTorch, float32 and int4, as a user runs it; without a network."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    arguments = [str(mini_bundle), str(int4_bundle), "--reference", str(DEMO), "--json"]
    done = run([*arguments, "--tasks", ",".join(TASKS), "--include-path", str(tasks)])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the harness's packages warn of much."""
    program = "import os; os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}\n"
    program += "import sys; from neo_tools.evaluate.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def test_float32_scores_what_pytorch_scores(report: dict[str, Any]) -> None:
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


def test_a_gate(mini_bundle: Path, int4_bundle: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    arguments = ["--tasks", "last_word", "--include-path", str(tasks), "--limit", "4", "--quiet"]
    done = run([str(mini_bundle), str(int4_bundle), *arguments, "--max-drop", "-0.001"])
    assert done.returncode == 1, done.stderr
    assert f"| last_word | acc ↑ | {mini_bundle.name} |" in done.stdout
    assert "| | | int4 |" in done.stdout
    assert "it/s" not in done.stderr
    done = run([str(mini_bundle), "--tasks", "no_such", "--include-path", str(tasks)])
    assert (done.returncode, done.stdout) == (2, "")
    assert "neo-eval: there is no task no_such; `lm_eval ls tasks`" in done.stderr
    shared = ["--tasks", "last_word", "--include-path", str(tasks)]
    for wrong, message in (
        ([str(int4_bundle / "none")], "none"),
        ([str(mini_bundle), "--reference", str(tasks)], "cannot be loaded"),
        ([str(mini_bundle), "--reference", "no/such/model"], "cannot be loaded"),
    ):
        done = run([*wrong, *shared])
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        assert message in done.stderr.splitlines()[-1]


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
    assert worst_drop(table) == pytest.approx(max(0, -apart.mean()))
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
    assert worst_drop(tabulated({"a": one, "b": other})) == 0, "it has another unit"


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
        ([str(mini_bundle), "--tasks", "a", "--limit", "0"], "0 is too small; at least 1"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments)
        assert message in capsys.readouterr().err
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    done = run([str(mini_bundle), str(mini_bundle), "--tasks", "last_word"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "a bundle is named twice" in done.stderr
