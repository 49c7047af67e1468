"""Streams that are closed, or whose encoding lacks characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from neo_runtime.command.standard_streams import json_text

if TYPE_CHECKING:
    from pathlib import Path

SHELL = "/bin/sh"
ODD = "“naïve” \N{SNOWMAN}"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="closes streams with a shell")


def run(tmp_path: Path, work: str, redirection: str, **environment: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command line that does `work`."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from neo_runtime.command.command_line import run_command\n"
        "from neo_runtime.errors import RequestError\n"
        "def work():\n" + "".join(f"    {line}\n" for line in work.splitlines()) + "    return 0\n"
        "sys.exit(run_command('neo-x', work, extras='x'))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [SHELL, "-c", f'exec "$0" "$1" {redirection}', sys.executable, str(program)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        input="asked",
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


WORK = """print('out', flush=True)
print('warning', file=sys.stderr)
with open('{file}', 'w') as file:
    os.write(1, b'from a library ')
    os.write(2, b'from a library ')
    file.write('result')"""


@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("", "out\nfrom a library ", "warning\nfrom a library "),
        (">&-", "", "warning\nfrom a library "),
        ("2>&-", "out\nfrom a library ", ""),
        (">&- 2>&- <&-", "", ""),
    ],
)
def test_a_closed_stream_leads_nowhere(
    tmp_path: Path, redirection: str, out: str, err: str
) -> None:
    """And no file that the work opens takes its place."""
    file = tmp_path / "file"
    assert run(tmp_path, WORK.format(file=file), redirection) == (0, out, err)
    assert file.read_text() == "result"


def test_errors_keep_their_status_without_stderr(tmp_path: Path) -> None:
    work = "raise RequestError('no')"
    assert run(tmp_path, work, "") == (2, "", "neo-x: no\n")
    assert run(tmp_path, work, "2>&-") == (2, "", "")
    assert run(tmp_path, work, "2>&- >&-") == (2, "", "")


def test_workers_have_the_streams_too(tmp_path: Path) -> None:
    work = (
        "import subprocess\n"
        "code = 'import os; [os.fstat(n) for n in range(3)]'\n"
        "return subprocess.run([sys.executable, '-c', code]).returncode"
    )
    assert run(tmp_path, work, ">&- 2>&- <&-")[0] == 0


def test_what_the_encoding_lacks_is_replaced(tmp_path: Path) -> None:
    work = f"print({ODD!r})"
    assert run(tmp_path, work, "", PYTHONIOENCODING="ascii") == (0, "?na?ve? ?\n", "")
    assert run(tmp_path, work, "", PYTHONIOENCODING="utf-8") == (0, f"{ODD}\n", "")
    chosen = run(tmp_path, work, "", PYTHONIOENCODING="ascii:xmlcharrefreplace")
    assert chosen == (0, "&#8220;na&#239;ve&#8221; &#9731;\n", "")


@pytest.mark.parametrize(
    ("encoding", "is_readable"),
    [("utf-8", True), ("UTF8", True), ("ascii", False), ("latin-1", False), ("cp1252", False)],
)
def test_json_loses_nothing(
    encoding: str, is_readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    text = json_text({"text": ODD}, indent=1)
    stream.write(text)
    stream.flush()
    assert json.loads(text) == {"text": ODD}
    assert (ODD in text) == is_readable


def test_json_for_a_stream_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert json_text([ODD]).isascii()
