"""Kernel timings that TensorRT keeps between builds: they save time, and cost no plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.errors import OutputError

from neo_export.files.replace import replace_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_place", "load_timings", "save_timings"]


def check_place(path: Path) -> None:
    """Before minutes of building rather than after them.

    Raises:
        OutputError: the file's folder does not exist, or the file is a folder.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}, the folder of --timing-cache, does not exist; make it")
    if path.is_dir():
        raise OutputError(f"--timing-cache {path} is a folder, expected a file")


def load_timings(config: Any, path: Path) -> None:
    """Let a builder use and collect timings, from nothing where a file does not suit this GPU."""
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        # Of another GPU or version: TensorRT takes it only when asked to ignore the difference.
        cache = config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)


def save_timings(config: Any, path: Path) -> str | None:
    """Keep what a build has timed; a warning where that fails."""
    cache = config.get_timing_cache()
    if cache is None:
        return None
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, memoryview(cache.serialize()))
    except OSError as error:
        return f"kernel timings could not be kept in {path} ({error.strerror})"
    return None
