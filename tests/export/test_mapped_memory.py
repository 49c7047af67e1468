"""Large arrays lie in files, and leave resident memory without losing anything."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from neo_export.mapped_memory import drop_pages, scratch_array


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
