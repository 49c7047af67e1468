"""Integer products of extreme numbers are exact, on this CPU and on one without VNNI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from helpers import saturation
from neo_export.quantize.int8 import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

EMULATOR = "qemu-x86_64"
WITHOUT_VNNI = "Haswell"
"""The first generation with AVX2: its kernel adds two products in 16 bits."""


def test_on_this_cpu(tmp_path: Path) -> None:
    path = str(tmp_path / "extremes.onnx")
    saturation.write_graph(path, LIMIT)
    worst, largest = saturation.difference(path, LIMIT)
    assert worst == 0
    assert largest == saturation.WIDTH * LIMIT * 128


def emulated(path: str, limit: int) -> tuple[float, float]:
    saturation.write_graph(path, limit)
    emulator = shutil.which(EMULATOR)
    if emulator is None:
        pytest.skip(f"{EMULATOR} is not installed (apt-get install qemu-user)")
    command = [emulator, "-cpu", WITHOUT_VNNI, sys.executable, saturation.__file__]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, path, str(limit)], capture_output=True, text=True, env=one_thread, timeout=120
    )
    if result.returncode:
        pytest.skip(f"{EMULATOR} cannot run this Python: {result.stderr[-200:]}")
    worst, largest = result.stdout.split()
    return float(worst), float(largest)


def test_on_a_cpu_without_vnni(tmp_path: Path) -> None:
    worst, largest = emulated(str(tmp_path / "extremes.onnx"), LIMIT)
    assert worst == 0
    assert largest == saturation.WIDTH * LIMIT * 128


def test_eight_bits_would_saturate_there(tmp_path: Path) -> None:
    """So the test above can fail."""
    worst, largest = emulated(str(tmp_path / "extremes.onnx"), 127)
    assert worst > 0.1 * largest
