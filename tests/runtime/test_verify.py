"""`neo-verify`: a verdict, an exit status, and never a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from helpers.bundles import edit_json, make_bundle
from helpers.fake_engine import PLAN, write_record
from neo_runtime.command import verify
from neo_runtime.command.verify import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_whole_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").write_text("mine\n")
    digest = make_bundle(folder.parent / "same").digest
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{folder}: every file has its recorded size and sha256" in out
    assert "GPT-Neo, 2 layers, width 8, vocabulary 11; fp32, target cpu, up to 16 posit" in out
    assert f"digest {digest}" in out
    assert "\n   64  weights.bin\n" in out
    assert "not listed in neo.json, not checked: notes.txt" in out


def test_a_name_writes_no_line_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a\n  digest 0\x1b[2A").write_text("")
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert r"not checked: a\n  digest 0\x1b[2A" in out
    assert "\x1b" not in out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    digest = make_bundle(folder).digest
    assert main([str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["status"] == "whole"
    assert report["digest"] == digest
    assert report["files"]["weights.bin"] == 64
    assert report["bytes"] == sum(report["files"].values())
    assert report["not_listed"] == []
    assert report["graphs"] == ["decode", "prefill", "score"]
    assert report["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_damaged_bundle(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    (folder / "weights.bin").write_bytes(bytes(64))
    assert main([str(folder), *options]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"neo-verify: {folder / 'weights.bin'} does not match its checksum")
    assert err.count("\n") == 1
    if options:
        assert json.loads(out)["status"] == "damaged"
        assert json.loads(out)["error"] == err.removeprefix("neo-verify: ").strip()
    else:
        assert out == ""


def test_plans_are_read_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(folder)
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"  plan test.plan: {len(PLAN)} bytes, tensorrt_rtx 1.7.1.116, compute capab" in out
    assert "not listed" not in out
    write_record(folder, bundle_digest="0" * 64)
    assert main([str(folder)]) == 0
    assert "capability 8.9; built from ANOTHER bundle, will not run" in capsys.readouterr().out
    (folder / "engines" / "test.plan").write_bytes(PLAN[::-1])
    assert main([str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "damaged"
    assert "test.plan differs from its record: sha256" in report["error"]
    (folder / "engines" / "test.plan").unlink()
    assert main([str(folder)]) == 1
    assert "test.plan is missing" in capsys.readouterr().err


def test_plans_that_cannot_be_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No verdict on bytes: the status of what cannot be used, not of damage."""
    write_record(folder)
    record = folder / "engines" / "test.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema_version": 99}))
    assert main([str(folder)]) == 2
    assert "has schema version 99" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_no_verdict(folder: Path) -> None:
    command = [sys.executable, "-m", "neo_runtime.command.verify", str(folder)]
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    said = done.stderr.decode()
    assert said == "neo-verify: cannot write to standard output: No space left on device\n"


def test_not_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"neo-verify: {tmp_path} has no neo.json; expected a folder written by neo-export\n"
    )


def test_whole_but_too_new_for_this_onnxruntime(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(folder, "minimum_onnxruntime", value="99.0")
    assert main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert "every file has its recorded size" in out
    assert "needs onnxruntime 99.0 or newer" in err


def test_without_onnxruntime(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "onnxruntime_is_installed", lambda: False)
    monkeypatch.setattr(verify, "check_installation", lambda *_: pytest.fail("was asked"))
    assert main([str(folder)]) == 0
    assert "onnxruntime is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--fast", "a"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("; see neo-verify --help\n")


def test_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "open_bundle", interrupt)
    assert main([str(folder)]) == 130


@pytest.mark.parametrize("tty", [True, False])
def test_progress_on_a_terminal_or_when_it_takes_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tty: bool
) -> None:
    """A clock that jumps 3 s a look: a terminal shows each file, a log every tenth second."""

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return tty

    stream = Stream()
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(verify.time, "monotonic", lambda: next(clock))
    assert main([str(folder)]) == 0
    text = stream.getvalue()
    if tty:
        assert text.count("\rchecked ") == 7
        assert text.endswith("\r\x1b[K")
    else:
        assert text == "checked 0.0 of 0.0 GB\n"


def test_the_command_itself(folder: Path) -> None:
    """In a process of its own: a closed pipe is no traceback, and --help loads nothing heavy."""
    command = [sys.executable, "-m", "neo_runtime.command.verify"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, str(folder)], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")

    code = (
        "import sys, neo_runtime.command.verify\n"
        "try: neo_runtime.command.verify.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('onnxruntime', 'torch', 'onnx', 'tokenizers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "exit status:" in shown.stdout
    assert shown.stdout.endswith("\n[]\n")
