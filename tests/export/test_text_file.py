from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from neo_export.files.text_file import write_text_file
from neo_runtime.errors import OutputError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text_file(tmp_path / "a.json", "alt")
    write_text_file(tmp_path / "a.json", "größer")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "größer"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_text_file(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text_file(tmp_path / "pipe", "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OutputError, match="Is a directory"):
        write_text_file(tmp_path, "text")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("mode", ["a", "w"])
def test_standard_output_in_a_file_keeps_what_it_has(mode: str, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; from neo_export.files.text_file import write_text_file; "
        "print('first'); write_text_file(pathlib.Path('/dev/stdout'), 'report\\n'); "
        "print('last')"
    )
    with (tmp_path / "out").open(mode) as out:
        out.write("before\n")
        out.flush()
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\nfirst\nreport\nlast\n"


def test_a_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text_file(path, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.json: No space left"):
        write_text_file(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
