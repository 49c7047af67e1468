"""Large arrays lie in files, and leave resident memory without losing anything."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from neo_export.files.mapped_memory import drop_pages, scratch_array, take_room
from neo_runtime.errors import OutputError


def resident() -> int:
    """Bytes of files in this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_pages_go_and_come_back() -> None:
    array = scratch_array((1 << 24,), "float32")  # 67 MB
    array[:] = np.arange(1 << 24, dtype=np.float32)
    before = resident()
    drop_pages(array[5:], array.reshape(2, -1))  # views lead to the file as well
    assert before - resident() > 50 << 20
    assert array[12345] == 12345
    assert array.sum(dtype=np.float64) == (1 << 24) * ((1 << 24) - 1) / 2


def test_small_arrays_lie_in_memory() -> None:
    array = scratch_array((10,), "float16")
    assert (array.dtype, array.sum()) == (np.float16, 0)
    assert not isinstance(array.base, mmap.mmap)
    array[:] = 1
    drop_pages(array)
    assert array.sum() == 10


def test_no_room_is_said_before_anything_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole that cannot be filled kills the process that writes to it."""

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"has no room for 80 MB .*No space left"):
        scratch_array((20_000_000,), "float32")
    with (tmp_path / "file").open("wb") as file, pytest.raises(OutputError, match="no room for"):
        take_room(file, 10**9, "the folder")


def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    with (tmp_path / "file").open("wb") as file:
        take_room(file, 1_000_000, "the folder")
    assert (tmp_path / "file").stat().st_size == 1_000_000


def test_room_is_taken(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        take_room(file, 1_000_000, "the folder")
    assert (tmp_path / "file").stat().st_size == 1_000_000
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1_000_000
