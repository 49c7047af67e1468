"""`make gpu-check`: verdicts computed from figures, and what it says where there is no GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from helpers.bench_samples import results as sample_results
from helpers.host_device import HostDevice
from neo_runtime.errors import NeoError
from neo_runtime.machine.gpu import GpuFacts
from neo_tools.bench.cli import main as bench
from neo_tools.bench.device_bandwidth import copy_rate
from neo_tools.bench.participants import BandwidthWorker
from neo_tools.bench.results import Ratio, Results
from neo_tools.bench.spread import spread
from neo_tools.bench.starting import gpu_command
from neo_tools.gpu_check.__main__ import main, run_suite
from neo_tools.gpu_check.report import BackendRun, Suite, write_report
from neo_tools.gpu_check.targets import judge

if TYPE_CHECKING:
    from pathlib import Path

    from neo_tools.bench.cases import Settings

GPU = GpuFacts(
    index=0,
    name="NVIDIA H100",
    compute_capability="9.0",
    memory_bytes=80 << 30,
    driver_cuda=(13, 1),
)


def run(
    *,
    step: float = 0.001,
    int4_step: float = 0.0005,
    prompt: float = 0.008,
    many: float = 0.002,
    share: float = 0.8,
    device: int = 3_000_000_000,
    eager: float = 3.5,
) -> Results:
    """A run of two bundles with these figures; seconds a step, and of the prompt."""
    base = sample_results()
    row = dataclasses.replace(base.rows[0], kind="bundle", new_tokens=10, prompt=0, depth=128)

    def decode(label: str, batch: int, seconds: float) -> object:
        return dataclasses.replace(
            row,
            label=label,
            batch=batch,
            test="tg10 @ d128",
            round_seconds=(10 * seconds,),
            tokens_per_second=spread([batch / seconds]),
            limit_share=share,
            cache_bytes=100_000_000,
            device_bytes=device,
        )

    rows = (
        decode("half", 1, step),
        decode("int4", 1, int4_step),
        decode("half", 32, many),
        dataclasses.replace(
            row, label="half", batch=1, depth=0, prompt=1024, round_seconds=(prompt,), new_tokens=0
        ),
    )
    facts = dataclasses.replace(
        base.participants[0], kind="bundle", label="half", weights_bytes=2_600_000_000
    )
    ratio = Ratio(
        test="tg10 @ d128",
        threads=1,
        batch=1,
        other="torch:fp16",
        bundle="half",
        rounds=(eager,),
        spread=spread([eager]),
    )
    against = dataclasses.replace(
        ratio,
        other="half",
        bundle="int4",
        rounds=(step / int4_step,),
        spread=spread([step / int4_step]),
    )
    facts_of_both = (facts, dataclasses.replace(facts, label="int4"))
    return dataclasses.replace(base, rows=rows, participants=facts_of_both, ratios=(ratio, against))


def verdicts(results: Results) -> list[str]:
    return [verdict.verdict for verdict in judge(results, "half", "int4")]


def test_targets_that_are_met() -> None:
    assert verdicts(run()) == ["met"] * 6
    measured = [verdict.measured for verdict in judge(run(), "half", "int4")]
    assert measured == ["80 %", "3.50 times", "2.00 times", "8.0 ms", "16.0 times", "111 %"]


@pytest.mark.parametrize(
    ("place", "figures"),
    [
        (0, {"share": 0.74}),
        (1, {"eager": 2.9}),
        (2, {"int4_step": 0.0006}),
        (3, {"prompt": 0.0101}),
        (4, {"many": 0.0022}),
        (5, {"device": 3_200_000_000}),
    ],
)
def test_a_target_that_is_missed(place: int, figures: dict[str, float]) -> None:
    found = verdicts(run(**figures))  # type: ignore[arg-type]
    assert found[place] == "not met"
    assert found.count("met") == 5


def test_what_was_not_measured_is_not_met() -> None:
    empty = dataclasses.replace(run(), rows=(), ratios=())
    assert verdicts(empty) == ["not measured"] * 6
    without = judge(run(), "half", None)
    assert [v.verdict for v in without].count("not measured") == 1


def test_the_report(tmp_path: Path) -> None:
    results = run(share=0.5)
    suite = Suite(passed=9, failed=0, skipped=1, exit_status=0)
    verdicts = judge(results, "half", "int4")
    runs = {
        "cuda": BackendRun(
            planned=("PyTorch eager", "torch.compile"),
            benches={"PyTorch eager": results},
            verdicts=verdicts,
        )
    }
    raw, text = write_report(tmp_path, GPU, suite, runs)
    found = json.loads(raw.read_text())
    assert found["schema"] == "neo-gpu-check/2"
    assert found["runs"]["cuda"]["benches"]["PyTorch eager"] == json.loads(
        json.dumps(results.to_dict(), default=str)
    )
    assert found["runs"]["cuda"]["targets"][0]["verdict"] == "not met"
    assert "| float16 decode, share of the copy bandwidth | at least 75 % | 50 % | not met |" in (
        text.read_text()
    )
    assert "9 passed, 0 failed, 1 skipped (correct)" in text.read_text()
    assert "### cuda beside PyTorch eager" in text.read_text()
    assert "NOT MEASURED: cuda beside torch.compile." in text.read_text()


def test_a_failed_suite_measures_nothing(tmp_path: Path) -> None:
    suite = Suite(passed=9, failed=1, skipped=0, exit_status=1)
    _, text = write_report(tmp_path, GPU, suite, {})
    assert "NOT CORRECT: nothing was measured" in text.read_text()
    for nothing in (
        Suite(passed=0, failed=0, skipped=8, exit_status=0),
        Suite(passed=3, failed=0, skipped=0, exit_status=2),
    ):
        assert not nothing.is_correct


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """As if there were one, and its figures those of `run`; what neo-bench was asked for."""
    asked: list[Settings] = []

    def measured(settings: Settings, progress: object) -> Results:
        asked.append(settings)
        names, results = {"half": "cuda-fp16", "int4": "cuda-int4"}, run()
        rows = [dataclasses.replace(r, label=names[r.label]) for r in results.rows]
        facts = [dataclasses.replace(p, label=names[p.label]) for p in results.participants]
        ratios = [
            dataclasses.replace(r, other=names.get(r.other, r.other), bundle=names[r.bundle])
            for r in results.ratios
        ]
        return dataclasses.replace(
            results, rows=tuple(rows), participants=tuple(facts), ratios=tuple(ratios)
        )

    monkeypatch.setattr("neo_runtime.machine.gpu.require_gpu", lambda device: GPU)
    monkeypatch.setattr("neo_tools.bench.run.run", measured)
    return asked


def test_the_parts_of_a_check(
    on_a_gpu: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite(passed=9, failed=0, skipped=1, exit_status=0)
    monkeypatch.setattr("neo_tools.gpu_check.__main__.run_suite", lambda *_: suite)
    assert main(["--output", str(tmp_path), "--device", "2"]) == 0
    eager, compiled = on_a_gpu
    assert [peer.label for peer in eager.peers] == ["torch:fp16"]
    assert [bundle.name for bundle in eager.bundles] == ["cuda-fp16", "cuda-int4"]
    assert {(c.kind, c.batch, c.prompt or c.depth) for c in eager.cases} == {
        ("prefill", 1, 511),
        ("decode", 1, 128),
        ("decode", 32, 128),
    }
    assert [peer.label for peer in compiled.peers] == ["torch:fp16-compiled"]
    assert [bundle.name for bundle in compiled.bundles] == ["cuda-fp16"]
    assert {case.batch for case in compiled.cases} == {1}
    assert {(s.backend, s.device) for s in on_a_gpu} == {("cuda", 2)}
    found = json.loads((tmp_path / "gpu-report.json").read_text())
    assert found["suite"]["passed"] == 9
    assert list(found["runs"]["cuda"]["benches"]) == ["PyTorch eager", "torch.compile"]
    assert found["runs"]["cuda"]["missing"] == []
    assert "NOT MEASURED" not in (tmp_path / "gpu-report.md").read_text()
    assert {entry.name for entry in tmp_path.iterdir()} == {"gpu-report.json", "gpu-report.md"}


def test_what_was_measured_before_an_interruption_stays(
    on_a_gpu: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neo_tools.bench.run import run as measured

    def interrupted(settings: Settings, progress: object) -> Results:
        if on_a_gpu:
            raise KeyboardInterrupt
        return measured(settings, print)

    monkeypatch.setattr("neo_tools.bench.run.run", interrupted)
    assert main(["--no-tests", "--output", str(tmp_path)]) == 130
    found = json.loads((tmp_path / "gpu-report.json").read_text())
    assert found["suite"] is None
    assert list(found["runs"]["cuda"]["benches"]) == ["PyTorch eager"]
    assert found["runs"]["cuda"]["missing"] == ["torch.compile"]
    assert [v["verdict"] for v in found["runs"]["cuda"]["targets"]][2] == "met"
    assert "tests: not run (--no-tests)" in (tmp_path / "gpu-report.md").read_text()
    assert {entry.name for entry in tmp_path.iterdir()} == {"gpu-report.json", "gpu-report.md"}


def test_a_termination_leaves_no_bundles(
    on_a_gpu: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(settings: Settings, progress: object) -> Results:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr("neo_tools.bench.run.run", terminated)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="143"):
            main(["--no-tests", "--output", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {entry.name for entry in tmp_path.iterdir()} == {"gpu-report.json", "gpu-report.md"}


def test_the_tests_see_the_gpu_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, pytest
@pytest.mark.gpu
def test_it():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["EXPECTED"]
"""
    (tmp_path / "test_seen.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: here\n")
    for visible, expected in ((None, "2"), ("5,6,7", "7")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("EXPECTED", expected)
        assert run_suite(tmp_path, 2).is_correct


def test_nothing_is_measured_behind_a_test_that_fails(
    on_a_gpu: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite(passed=9, failed=1, skipped=0, exit_status=1)
    monkeypatch.setattr("neo_tools.gpu_check.__main__.run_suite", lambda *_: suite)
    assert main(["--output", str(tmp_path)]) == 1
    assert not on_a_gpu
    assert json.loads((tmp_path / "gpu-report.json").read_text())["runs"] == {}


def test_counting_a_suite(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_a(): pass\n"
        "@pytest.mark.gpu\ndef test_b(): assert 0\n"
        "@pytest.mark.gpu\ndef test_c(): pytest.skip('no')\n"
        "def test_d(): assert 0\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: here\n")
    found = run_suite(tmp_path)
    assert (found.passed, found.failed, found.skipped, found.exit_status) == (1, 1, 1, 1)


def test_no_gpu_is_said_and_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert main(["--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(("gpu-check: cuda-bindings is missing", "gpu-check: there is no NVIDIA"))
    assert not (tmp_path / "out").exists()


def test_help_is_light() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "neo_tools.gpu_check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "exit status" in done.stdout
    for heavy in ("torch", "onnx", "numpy"):
        assert f" {heavy}\n" not in done.stderr


def test_bench_on_a_gpu_runs_torch_here_and_measures_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def stand_in(settings: Settings, progress: object) -> Results:
        seen.append(settings)
        raise NeoError("that is all")

    monkeypatch.setattr("neo_tools.bench.run.run", stand_in)
    command = ["bundle", "--backend", "cuda", "--device", "1", "--peer", "torch"]
    command += ["--peer", "torch:fp16-compiled", "--model", str(tmp_path)]
    assert bench(command) == 2
    [settings] = seen
    assert (settings.on_gpu, settings.device) == (True, 1)
    assert [peer.label for peer in settings.peers] == ["torch:fp16", "torch:fp16-compiled"]
    peer = gpu_command(settings, settings.peers[1], 2)
    assert peer[:3] == [sys.executable, "-m", "neo_tools.peers.worker_torch"]
    assert peer[-6:] == ["--precision", "fp16-compiled", "--threads", "2", "--device", "cuda:1"]
    probe = BandwidthWorker(threads=1, size=None, timeout=1, device=1)
    assert probe._command == [
        *(sys.executable, "-m", "neo_tools.bench.device_bandwidth"),
        *("--device", "1"),
    ]


@pytest.mark.parametrize("peer", ["openvino:int8", "torch:fp32"])
def test_other_peers_do_not_run_on_a_gpu(
    peer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bundle", "--backend", "cuda", "--peer", peer, "--model", str(tmp_path)]
    assert bench(command) == 2
    assert f"the peer {peer} does not run on a GPU here" in capsys.readouterr().err


def test_the_bandwidth_worker_says_why_it_cannot() -> None:
    command = [sys.executable, "-m", "neo_tools.bench.device_bandwidth", "--device", "0"]
    requests = '{"op": "read"}\n{"op": "quit"}\n'
    done = subprocess.run(command, input=requests, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    if answer["ok"]:  # there is a GPU
        assert answer["rates"]["device copy"] > 0
    else:
        assert re.search("driver|cuda", answer["error"])
        assert "Traceback" not in done.stderr


def test_a_copy_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("neo_tools.bench.device_bandwidth.perf_counter", lambda: next(ticks))
    device = HostDevice()
    assert copy_rate(device, 1000, copies=4, passes=2) == 8000.0  # 2 · 4 · 1000 bytes in 1 s
    assert not device.blocks
