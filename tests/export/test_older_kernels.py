"""Quantized bundles on a CPU with AVX2 and nothing newer: the tests of parity, run again there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.older_kernels import why_needless

PARITY = Path(__file__).with_name("test_quantized_parity.py")


def test_quantized_parity(older_kernels: dict[str, str]) -> None:
    reason = why_needless()
    if reason is not None:
        pytest.skip(reason)
    # The handler of faults would take the signal that hides the instructions.
    options = ["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(PARITY)],
        capture_output=True,
        text=True,
        env=older_kernels,
        cwd=PARITY.parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout.splitlines()[-1]
