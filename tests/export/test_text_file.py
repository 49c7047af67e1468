from __future__ import annotations

from pathlib import Path

import pytest
from neo_export.text_file import write_text_file
from neo_runtime.errors import OutputError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text_file(tmp_path / "a.json", "alt")
    write_text_file(tmp_path / "a.json", "größer")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "größer"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


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
