from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.models import DEMO
from neo_runtime.errors import (
    BundleError,
    CheckpointError,
    DependencyError,
    NeoError,
    RequestError,
)
from neo_tools.peers import environments, exports, measure, portable
from neo_tools.peers.__main__ import main


def fake_environment(root: Path, name: str, exporter: str) -> None:
    """A peer's environment whose `optimum-cli` is the shell script `exporter`."""
    folder = root / name
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    script = folder / "bin" / "optimum-cli"
    script.write_text(f'#!/bin/sh\nfor out; do :; done\necho "$@" >> {root}/calls\n{exporter}\n')
    script.chmod(0o755)
    fingerprint = environments.PEERS[name].fingerprint
    (folder / "neo-peer.json").write_text(json.dumps({"fingerprint": fingerprint}))


def checkpoint(folder: Path, weights: bytes = b"x" * 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_setup_installs_torch_first_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", lambda command, what: steps.append(list(command)))
    (tmp_path / "openvino").mkdir()
    environments.setup("openvino", tmp_path)
    words = [step[step.index("pip") + 2 :] if "pip" in step else step[1:] for step in steps]
    constraint = str(environments.PEERS["openvino"].constraints)
    assert words[0][:2] == ["-m", "venv"]
    assert words[1] == ["install", "--quiet", "--constraint", constraint, "torch"]
    assert words[2][:4] == words[1][:4]
    assert "optimum-intel" in words[2]
    assert words[3] == ["uninstall", "--quiet", "--yes", "torchvision"]
    assert environments.is_ready("openvino", tmp_path)
    environments.setup("openvino", tmp_path)
    assert len(steps) == 5  # the fifth tried it out; the second call did nothing


def test_setup_that_fails_says_why_and_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_environment(tmp_path, "torch", "")
    (tmp_path / "torch" / "neo-peer.json").unlink()
    (tmp_path / "torch" / "bin" / "python").unlink()
    script = tmp_path / "torch" / "bin" / "python"
    script.write_text("#!/bin/sh\necho no such version; exit 3\n")
    script.chmod(0o755)
    with pytest.raises(DependencyError) as caught:
        environments.setup("torch", tmp_path)
    assert "install torch for torch" in str(caught.value)
    assert "status 3" in str(caught.value)
    assert "no such version" in str(caught.value)
    assert "no such version" in capsys.readouterr().err
    assert not environments.is_ready("torch", tmp_path)


def test_an_environment_for_other_versions_is_not_ready(tmp_path: Path) -> None:
    fake_environment(tmp_path, "torch", "")
    assert environments.is_ready("torch", tmp_path)
    (tmp_path / "torch" / "neo-peer.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(DependencyError, match="other versions"):
        environments.python_of("torch", tmp_path)


def test_root_folder_follows_argument_then_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEO_PEERS", raising=False)
    assert environments.root_folder() == tmp_path / "build" / "peers"
    monkeypatch.setenv("NEO_PEERS", "/from/variable")
    assert environments.root_folder() == Path("/from/variable")
    assert environments.root_folder(tmp_path) == tmp_path


def test_constraints_pin_what_is_required() -> None:
    for spec in environments.PEERS.values():
        lines = spec.constraints.read_text(encoding="utf-8").splitlines()
        pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
        for requirement in ("torch", *spec.requirements, *spec.remove):
            assert requirement.partition("[")[0] in pinned, (spec.name, requirement)
        assert all("==" in line or line.startswith("#") for line in lines)
        assert "/" not in "".join(lines[1:])


@pytest.mark.parametrize(("set_to", "found"), [(None, "1"), ("0", "0")])
def test_peers_report_no_usage_unless_the_user_decided(
    monkeypatch: pytest.MonkeyPatch, set_to: str | None, found: str
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if set_to is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", set_to)
    assert environments.peer_environ()["ORT_DISABLE_TELEMETRY"] == found


def test_peer_environ_keeps_this_interpreters_paths_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environ = environments.peer_environ(2)
    assert "PYTHONPATH" not in environ
    assert environ["OMP_NUM_THREADS"] == "2"
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_an_export_happens_once(tmp_path: Path) -> None:
    fake_environment(tmp_path, "optimum", 'mkdir -p "$out"; echo graph > "$out/model.onnx"')
    model = checkpoint(tmp_path / "tiny")
    folder = exports.ensure_export("optimum", model, "fp32", tmp_path)
    assert (folder / "model.onnx").read_text() == "graph\n"
    assert exports.ensure_export("optimum", model, "fp32", tmp_path) == folder
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith(f"export onnx --task text-generation-with-past --model {model} ")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_another_checkpoint_of_the_same_name_has_another_folder(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "a" / "tiny")
    other = checkpoint(tmp_path / "b" / "tiny", b"y" * 100)
    copy = checkpoint(tmp_path / "c" / "tiny")
    folders = [exports.exported_folder("optimum", m, "fp32", tmp_path) for m in (one, other, copy)]
    assert folders[0] != folders[1]
    assert folders[0] == folders[2]


@pytest.mark.parametrize(
    ("exporter", "expected"),
    [
        ('mkdir -p "$out"; echo out of ideas; exit 4', "out of ideas"),
        ('mkdir -p "$out"; echo nothing to do', "did not write"),
    ],
)
def test_an_export_that_fails_leaves_nothing(tmp_path: Path, exporter: str, expected: str) -> None:
    fake_environment(tmp_path, "openvino", exporter)
    model = checkpoint(tmp_path / "tiny")
    with pytest.raises(NeoError, match=expected):
        exports.ensure_export("openvino", model, "int8", tmp_path)
    assert list((tmp_path / "models").glob("*/*")) == []


def test_export_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no precision 'int3', expected one of int8, int4, fp32"):
        exports.ensure_export("openvino", DEMO, "int3", tmp_path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        exports.ensure_export("torch", tmp_path, "fp32", tmp_path)
    assert exports.ensure_export("torch", DEMO, "fp32", tmp_path) == DEMO


def test_export_time_measures_and_keeps_the_folder(tmp_path: Path) -> None:
    exporter = 'mkdir -p "$out"; head -c 1000 /dev/zero > "$out/model.onnx"; sleep 0.3'
    fake_environment(tmp_path, "optimum", exporter)
    model, out = checkpoint(tmp_path / "tiny"), tmp_path / "out"
    report = exports.export_time(model, out, tmp_path)
    assert report.seconds >= 0.3
    assert report.folder_bytes == 1000
    assert report.peak_rss >= report.peak_rss_anon > 0
    assert report.command[:3] == ("optimum-cli", "export", "onnx")
    with pytest.raises(RequestError, match="exists"):
        exports.export_time(model, out, tmp_path)


def test_run_measured_sees_the_memory_of_children() -> None:
    hold = "import time; block = bytearray(b'x') * (80 << 20); time.sleep(0.4)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    measured = measure.run_measured([sys.executable, "-c", code], what="hold memory")
    assert measured.peak_rss_anon > 80 << 20
    assert measured.peak_rss >= measured.peak_rss_anon


def test_run_measured_counts_as_workers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "resident_of", lambda pid: {"rss": 5, "rss_anon": 3})
    measured = measure.run_measured(["sleep", "0.2"], what="sleep")
    assert (measured.peak_rss, measured.peak_rss_anon) == (5, 3)


def test_run_measured_ends_a_program_that_takes_too_long() -> None:
    with pytest.raises(NeoError, match="choose a longer timeout"):
        measure.run_measured(["sleep", "60"], what="sleep", timeout=0.2)
    with pytest.raises(NeoError, match="does not start"):
        measure.run_measured(["/no/such/program"], what="run nothing")


def test_command_line_prints_errors_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "optimum", str(DEMO), "--root", str(tmp_path)]) == 2
    assert main(["export-time", str(tmp_path), "--root", str(tmp_path)]) == 2
    assert main(["load-portable", str(tmp_path), "--root", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["peers"] * 3
    assert "setup optimum" in printed.err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 3}'])
def test_a_marker_that_says_nothing_is_no_environment(content: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "neo-peer.json").write_text(content)
    with pytest.raises(DependencyError, match="was set up for other versions"):
        environments.python_of("torch", tmp_path)


def test_load_portable_wants_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="neo-export MODEL -o BUNDLE --target portable"):
        portable.load_portable(tmp_path)
