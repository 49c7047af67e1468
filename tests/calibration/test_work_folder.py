"""Room for hidden states: taken before they are written, given back where it does not do."""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from neo_calibration.work_folder import WorkFolder
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path


def test_room_for_all_rows_is_taken_first(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path, tmp_path / "statistics")
    with folder.hidden_to_write(3, 1000, 64) as rows:
        assert (tmp_path / "hidden.3.partial").stat().st_blocks * 512 >= 4 * 1000 * 64
        rows[:] = 2.0
    assert (folder.hidden(3, 1000, 64) == 2.0).all()


def test_what_is_finished_is_kept_when_the_end_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "statistics"

    def has_part() -> bool:
        with WorkFolder.acquire(target, {"a": 1}, force=True) as work:
            return work.has_part("layer")

    with WorkFolder.acquire(target, {"a": 1}, force=False) as work:
        work.write_part("layer", [])
    target.mkdir()
    (target / "statistics.json").write_text('{"schema_version": 1}')
    with (
        pytest.raises(OutputError, match="exists already"),
        WorkFolder.acquire(target, {"a": 1}, force=True) as work,
    ):
        work.finish(force=False)
    assert has_part()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.rmtree(target)
    with monkeypatch.context() as patch:
        patch.setattr("neo_calibration.work_folder.rename_exclusive", full)
        with (
            pytest.raises(OutputError, match="what is finished is in"),
            WorkFolder.acquire(target, {"a": 1}, force=True) as work,
        ):
            work.finish(force=False)
    assert has_part()


def test_a_full_disk_is_said_and_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        os.ftruncate(descriptor, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    folder = WorkFolder(tmp_path, tmp_path / "statistics")
    with (
        pytest.raises(OutputError, match="no room for 0 MB of hidden states"),
        folder.hidden_to_write(0, 1000, 64),
    ):
        pytest.fail("the work began")
    assert not list(tmp_path.iterdir())
