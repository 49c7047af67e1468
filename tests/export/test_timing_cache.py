"""What keeps kernel timings between builds, beside a builder that is not TensorRT's."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from neo_export.engine.timing_cache import check_place, load_timings, save_timings
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

HERE = b"timings of this GPU"


class Config:
    """As `IBuilderConfig`: no timings of another GPU, unless asked to ignore the difference."""

    def __init__(self) -> None:
        self.cache: Any = None

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(data=data, serialize=lambda: data or HERE)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache.data not in (b"", HERE) and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


def test_timings_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "timing.cache"
    for _ in range(2):
        config = Config()
        load_timings(config, path)
        assert save_timings(config, path) is None
        assert path.read_bytes() == HERE
    assert config.cache.data == HERE


def test_those_of_another_gpu_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"timings of another GPU")
    config = Config()
    load_timings(config, path)
    assert save_timings(config, path) is None
    assert path.read_bytes() == HERE


def test_a_build_is_not_lost_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    load_timings(config, tmp_path / "no" / "such" / "file")
    warning = save_timings(config, tmp_path / "no" / "such" / "file")
    assert warning is not None
    assert "could not be saved to" in warning

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in str(save_timings(config, tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_looked_at_before_the_build(tmp_path: Path) -> None:
    check_place(tmp_path / "file")
    with pytest.raises(OutputError, match="is a folder"):
        check_place(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        check_place(tmp_path / "no" / "file")
