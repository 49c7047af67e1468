"""How command lines end: what is written, with which status, and what is not caught."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
from neo_runtime.command.command_line import OneLineParser, run_command
from neo_runtime.errors import DependencyError, RequestError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("status", [0, 1])
def test_the_works_own_status(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("neo-x", lambda: status, extras="x") == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RequestError("no such  folder"), 2, "no such  folder"),
        (RequestError("it failed:\n  once\n\n  twice\n"), 2, "it failed: once twice"),
        (VerificationError("layer 3 is off"), 2, "layer 3 is off"),
        (DependencyError("needs onnxruntime"), 2, "needs onnxruntime"),
        (FULL, 2, "a file cannot be used: No space left on device"),
        (
            ModuleNotFoundError("No module named 'onnx'", name="onnx"),
            2,
            "the package onnx is missing; install neo-onnx with its extra: "
            "pip install 'neo-onnx[x]'",
        ),
        (
            ModuleNotFoundError("No module named 'fcntl'", name="fcntl"),
            2,
            "this Python has no module fcntl, which it has on Linux and macOS; on Windows use the "
            "Windows Subsystem for Linux",
        ),
        (
            ImportError("libcudart.so.13: cannot open shared object file"),
            2,
            "libcudart.so.13: cannot open shared object file; install neo-onnx with its extra: "
            "pip install 'neo-onnx[x]'",
        ),
    ],
)
def test_an_error_is_one_line(
    error: Exception, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("neo-x", raising(error), extras="x") == status
    assert capsys.readouterr() == ("", f"neo-x: {line}\n")


def test_what_a_command_may_choose(capsys: pytest.CaptureFixture[str]) -> None:
    error = VerificationError("a\nb\nc")
    work, first = raising(error), lambda text: str(text).splitlines()[0]
    assert run_command("neo-x", work, extras="x", unverified=1, wording=first) == 1
    assert capsys.readouterr().err == "neo-x: a\n"
    missing = raising(ModuleNotFoundError("no", name="onnx"))
    assert run_command("neo-x", missing, extras="x,y", unverified=1) == 2
    assert "its extras: pip install 'neo-onnx[x,y]'" in capsys.readouterr().err


def test_what_the_system_says_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    work = raising(FileNotFoundError(2, "No such file or directory", "nowhere"))
    assert run_command("neo-x", work, extras="x") == 2
    said = capsys.readouterr().err
    assert said == "neo-x: nowhere cannot be used: No such file or directory\n"
    assert run_command("neo-x", raising(OSError("half a word")), extras="x") == 2
    assert capsys.readouterr().err == "neo-x: half a word\n"


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    work = raising(KeyboardInterrupt())
    assert run_command("neo-x", work, extras="x") == 130
    assert capsys.readouterr() == ("", "")
    assert run_command("neo-x", work, extras="x", interrupted="interrupted, go on") == 130
    assert capsys.readouterr() == ("", "neo-x: interrupted, go on\n")
    late = raising(KeyboardInterrupt("interrupted, half is done"))
    assert run_command("neo-x", late, extras="x", interrupted="interrupted, go on") == 130
    assert capsys.readouterr() == ("", "neo-x: interrupted, half is done\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(143)])
def test_what_nobody_foresaw_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        run_command("neo-x", raising(error), extras="x")
    assert raised.value is error


def test_a_reader_that_went_away() -> None:
    """The interpreter's own last flush must not complain, either."""
    code = (
        "import sys\n"
        "from neo_runtime.command.command_line import run_command\n"
        "def work():\n"
        "    sys.stdin.read()\n"
        "    print('x' * 100)\n"  # stays in the buffer until it is flushed
        "    return 0\n"
        "sys.exit(run_command('neo-x', work, extras='x'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneLineParser(prog="neo-x")
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--none"])
    assert stopped.value.code == 2
    expected = "neo-x: unrecognized arguments: --none; see neo-x --help\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    "module",
    [
        "neo_calibration.cli",
        "neo_export.command.cli",
        "neo_export.engine.cli",
        "neo_runtime.command.generate",
        "neo_runtime.command.verify",
        "neo_tools.bench.cli",
        "neo_tools.diff.cli",
    ],
)
def test_every_command_tells_its_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--version"])
    assert not end.value.code
    name, number = capsys.readouterr().out.split()
    assert name.startswith("neo-")
    assert number == version("neo-onnx")
