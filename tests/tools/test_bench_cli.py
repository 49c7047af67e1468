from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bench_samples import results
from neo_runtime.errors import DependencyError
from neo_tools.bench import cli, run
from neo_tools.bench.cases import PeerChoice, Settings
from neo_tools.peers import environments

HEAVY = ("numpy", "onnx", "onnxruntime", "tokenizers", "torch")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Settings that would be run; the run is made up."""
    found: list[Settings] = []

    def fake(settings: Settings, progress: object) -> object:
        found.append(settings)
        return results()

    monkeypatch.setattr(run, "run", fake)
    return found


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from neo_tools.bench.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: neo-bench" in done.stdout
    assert done.stderr.strip() == "[]"


def test_lists_are_collected_and_crossed(
    seen: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "b1 b2 -p 16,8 -p 16 -p 4 -n 2 -d 9,10 -b 1,8 -t 1 -r 7 --keep-context -o csv"
    assert cli.main(arguments.split()) == 0
    [settings] = seen
    assert settings.bundles == (Path("b1"), Path("b2"))
    assert settings.prompts == (16, 8, 4)
    assert settings.depths == (9, 10)
    assert settings.batches == (1, 8)
    assert settings.repetitions == 7
    assert settings.keep_context
    assert settings.warmup
    assert len(settings.cases) == 2 * (3 + 2)
    output = capsys.readouterr()
    assert len(list(csv.DictReader(io.StringIO(output.out)))) == 4
    assert output.err == "neo-bench: warning: it was busy\n"
    assert cli.main(["b1", "--json"]) == 0
    assert "rows" in json.loads(capsys.readouterr().out)


def test_peers_are_parsed_with_their_precisions(
    seen: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "python_of", lambda name, root: Path("python"))
    arguments = "b --peer torch --peer openvino:int4 --peer torch:bf16 --peer torch:fp32 --model m"
    assert cli.main(arguments.split()) == 0
    assert seen[0].peers == (
        PeerChoice(name="torch", precision="fp32"),
        PeerChoice(name="openvino", precision="int4"),
        PeerChoice(name="torch", precision="bf16"),
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("b -p x", "-p: 'x' is not a list of numbers"),
        ("b -d 0", "-d: 0 is too small, expected at least 1"),
        ("b -p 0 -n 0", "nothing to measure"),
        ("b -r 0", "0 is too small"),
        ("b --device -1", "-1 is too small, expected at least 0"),
        ("b -r many", "invalid number value: 'many'"),
        ("b -o xml", "invalid choice"),
        ("b --peer torch", "name its folder with --model"),
        ("b --peer nobody --model m", "no peer is called 'nobody'"),
        ("b --peer torch:int3 --model m", "no precision 'int3', expected one of fp32, bf16"),
        ("b --plot b.pdf", "expected a name that ends in .svg"),
        ("b --plot nowhere/b.svg", "does not exist"),
        ("no-such-bundle", "no-such-bundle does not exist"),
        ("", "BUNDLE"),
    ],
)
def test_misuse_is_one_line_and_status_2(
    arguments: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments.split())
    except SystemExit as end:  # argparse's own
        status = int(str(end.code))
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("neo-bench: ")
    assert expected in line


def test_missing_environment_is_told_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["b", "--peer", "torch", "--model", "m", "--root", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "neo_tools.peers setup torch" in capsys.readouterr().err


def test_a_workers_last_lines_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings, progress: object) -> None:
        raise DependencyError("the worker ended. Its last lines:\nTraceback\n  foo\nOSError: no")

    monkeypatch.setattr(run, "run", fail)
    assert cli.main(["b"]) == 2
    assert capsys.readouterr().err == ("neo-bench: the worker ended. Its last lines: OSError: no\n")


def test_plot_is_written_beside_the_report(
    seen: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "roof.svg"
    assert cli.main(["b", "--plot", str(path)]) == 0
    assert path.read_text(encoding="utf-8").startswith("<svg")
    assert "| model" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_plot_that_cannot_be_written(
    seen: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert cli.main(["b", "--plot", str(tmp_path / "roof.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(settings: Settings, progress: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupt)
    assert cli.main(["b"]) == 130


def test_a_bundle_that_no_cpu_runs(
    tensorrt_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before any worker starts."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr("neo_runtime.machine.gpu._DRIVER_LIBRARY", "libno-such-driver.so.1")
    for flags, reason in (([], "there is no NVIDIA driver"), (["--backend", "cpu"], "asked for")):
        assert cli.main([str(tensorrt_bundle), *flags, "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "(tensorrt, fp32) runs on a GPU alone: " in said
        assert reason in said
        assert said.count("\n") == 1


def test_threads_that_no_machine_has(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(mini_bundle), "-t", "100000", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"neo-bench: the bundle {mini_bundle.name} could not load: threads is ")
    assert err.count("\n") == 1
