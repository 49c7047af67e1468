"""Killed at any moment, a calibration goes on, and ends with the same bytes."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.kills import fork, killed, snapshot
from helpers.models import TinyConfig, make_checkpoint, random_ids
from neo_calibration import collect as collecting
from neo_calibration.collect import collect
from neo_calibration.text import CalibrationText
from neo_export.checkpoint.folder import open_checkpoint
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = TinyConfig(attention_layers=("global", "local", "global", "local"))


def text(seed: int = 3) -> CalibrationText:
    contexts = tuple(random_ids(CONFIG, 6, CONFIG.max_position_embeddings, seed=seed))
    return CalibrationText(contexts=contexts, max_length=40, files={}, warnings=())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", CONFIG)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "stats"
    run(checkpoint, folder)
    return snapshot(folder)


def run(checkpoint: Path, folder: Path, seed: int = 3, *, force: bool = False) -> None:
    import torch

    torch.set_num_threads(1)
    with open_checkpoint(checkpoint) as opened:
        collect(opened, text(seed), folder, force=force)


def test_two_runs_give_the_same_bytes(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    run(checkpoint, tmp_path / "stats")
    assert snapshot(tmp_path / "stats") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["stats"], "nothing else is left"


def test_killed_again_and_again(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """By SIGKILL at random moments; what is there at the end is what one run gives."""
    randomness, kills = random.Random(0), 0
    for number in range(12):
        folder = tmp_path / f"stats-{number}"
        longest = 0.03  # too short for the whole; then seldom long enough, even here
        while not folder.exists():
            pid = fork(lambda folder=folder: run(checkpoint, folder))
            time.sleep(randomness.uniform(0.0, longest))
            longest = max(0.1, 1.5 * longest)  # where the machine is busy, it takes longer
            os.kill(pid, signal.SIGKILL)
            kills += killed(pid)
        assert snapshot(folder) == whole
    assert kills >= 10


class StoppedError(Exception):
    """Stands for a kill at an exact place."""


def test_finished_layers_are_not_run_again(
    checkpoint: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers: list[int] = []
    original = collecting._layer

    def stop_at_2(state: object, layer: int) -> None:
        layers.append(layer)
        if len(layers) == 3:
            raise StoppedError
        original(state, layer)  # type: ignore[arg-type]

    monkeypatch.setattr(collecting, "_layer", stop_at_2)
    with pytest.raises(StoppedError):
        run(checkpoint, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()
    run(checkpoint, tmp_path / "stats")
    assert layers == [0, 1, 2, 2, 3]
    assert snapshot(tmp_path / "stats") == whole


def test_other_text_starts_anew(
    checkpoint: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "_head", stop)
        with pytest.raises(StoppedError):
            run(checkpoint, tmp_path / "stats", seed=4)
    run(checkpoint, tmp_path / "stats", seed=3)
    assert snapshot(tmp_path / "stats") == whole


def test_killed_when_the_old_folder_is_removed(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have traded places by then: the old one lies where the unfinished one was."""
    run(checkpoint, tmp_path / "stats", seed=4)

    def stop(*_: object, **__: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("neo_calibration.work_folder.shutil.rmtree", stop)
        with pytest.raises(StoppedError):
            run(checkpoint, tmp_path / "stats", force=True)
    for _ in range(2):
        run(checkpoint, tmp_path / "stats", force=True)
        assert snapshot(tmp_path / "stats") == whole


def test_a_failed_write_says_where_the_finished_part_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("neo_calibration.work_folder.write_arrays", full)
    with pytest.raises(
        OutputError, match=r"No space .* finished is in .*/\.stats\.calibrating, and"
    ):
        run(checkpoint, tmp_path / "stats")


def test_what_is_there_is_replaced_only_when_asked(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "stats"
    run(checkpoint, folder, seed=4)
    before = snapshot(folder)
    with pytest.raises(OutputError, match="exists already; use --force"):
        run(checkpoint, folder)
    assert snapshot(folder) == before
    run(checkpoint, folder, force=True)
    assert snapshot(folder) == whole
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="refusing to replace"):
        run(checkpoint, other, force=True)
    with pytest.raises(OutputError, match="no folder"):
        run(checkpoint, tmp_path / "absent" / "stats")
    assert np.array_equal(sorted(p.name for p in tmp_path.iterdir()), ["other", "stats"])
