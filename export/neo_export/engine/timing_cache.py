"""TensorRT's timing cache: kernel timings kept between builds, which make later builds faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.errors import OutputError

from neo_export.files.replace import replace_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_place", "load_timings", "save_timings"]


def check_place(path: Path) -> None:
    """Check the path before the build, which takes minutes.

    Raises:
        OutputError: the parent folder does not exist, or the path is a folder.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}, the folder of --timing-cache, does not exist; create it")
    if path.is_dir():
        raise OutputError(f"--timing-cache {path} is a folder, expected a file; name a file in it")


def load_timings(config: Any, path: Path) -> None:
    """Give a builder the timings of a file, or an empty cache if they do not fit this GPU."""
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        # From another GPU or version: TensorRT refuses it unless told to ignore the mismatch.
        cache = config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)


def save_timings(config: Any, path: Path) -> str | None:
    """Save the timings of a build; returns a warning if they cannot be written."""
    cache = config.get_timing_cache()
    if cache is None:
        return None
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, memoryview(cache.serialize()))
    except OSError as error:
        return f"kernel timings could not be saved to {path} ({error.strerror})"
    return None
