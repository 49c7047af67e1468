"""Integer products of extreme numbers are exact, on this CPU and on one without VNNI."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from helpers import saturation
from neo_export.quantize.int8 import LIMIT

if TYPE_CHECKING:
    from pathlib import Path


def test_on_this_cpu(tmp_path: Path) -> None:
    path = str(tmp_path / "extremes.onnx")
    saturation.write_graph(path, LIMIT)
    worst, largest = saturation.difference(path, LIMIT)
    assert worst == 0
    assert largest == saturation.WIDTH * LIMIT * 128


def without_vnni(path: str, limit: int, environ: dict[str, str]) -> tuple[float, float]:
    saturation.write_graph(path, limit)
    command = [sys.executable, saturation.__file__, path, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    worst, largest = done.stdout.split()
    return float(worst), float(largest)


def test_on_a_cpu_without_vnni(tmp_path: Path, older_kernels: dict[str, str]) -> None:
    worst, largest = without_vnni(str(tmp_path / "extremes.onnx"), LIMIT, older_kernels)
    assert worst == 0
    assert largest == saturation.WIDTH * LIMIT * 128


def test_eight_bits_would_saturate_there(tmp_path: Path, older_kernels: dict[str, str]) -> None:
    """So the test above can fail, and the kernel for AVX2 did run."""
    worst, largest = without_vnni(str(tmp_path / "extremes.onnx"), 127, older_kernels)
    assert worst > 0.1 * largest
