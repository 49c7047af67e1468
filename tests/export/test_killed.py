"""Exports ended by SIGKILL leave the old bundle or the new one, and the next export works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.bundles import make_bundle

TESTS = Path(__file__).parents[1]


def run(tmp_path: Path, mode: str, *arguments: int, weights: int) -> dict[str, int]:
    (tmp_path / "out").mkdir()
    make_bundle(tmp_path / "old")
    make_bundle(tmp_path / "new", weights=os.urandom(weights))
    folders = [str(tmp_path / name) for name in ("out", "old", "new")]
    command = [sys.executable, "-m", "helpers.kills", mode, *folders, *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_at_200_random_moments(tmp_path: Path) -> None:
    counts = run(tmp_path, "random", 200, 20260728, weights=2_000_000)
    assert counts["killed"] == 200
    # That the moments were spread: in the middle of writing, and after the swap.
    assert counts["leftovers"] > 20, counts
    assert counts["absent to absent"] > 10, counts
    assert counts["old to old"] > 10, counts
    assert counts["absent to new"] + counts["old to new"] > 2, counts


def test_step_by_step(tmp_path: Path) -> None:
    counts = run(tmp_path, "steps", 29, weights=64)
    assert counts["finished"] == 1
    assert counts["old"] > 10, counts
    assert counts["new"] > 2, counts
    assert "absent" not in counts


def test_step_by_step_without_an_atomic_swap(tmp_path: Path) -> None:
    counts = run(tmp_path, "plain", 29, weights=64)
    assert counts["finished"] == 1
    assert counts["old"] > 10, counts
    assert counts["new"] > 2, counts
    assert counts["absent"] > 0, counts  # And every time the old bundle was put back.
