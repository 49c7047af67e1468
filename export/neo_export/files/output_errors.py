"""Translates failed writes for the user: which disk, how much space, what to do."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from neo_runtime.errors import NeoError, OutputError

__all__ = ["as_output_error", "require_space"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_ONLY_WRITING = {*_FULL, errno.EFBIG, errno.EROFS}
"""Errors that reading a file never raises."""
_NEARLY_NOTHING = 1 << 20


def require_space(destination: Path, parent: Path, needed: int) -> None:
    """Refuse early what does not fit on the disk.

    Raises:
        OutputError: fewer than `needed` bytes are free in `parent`.
    """
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"cannot write {destination}: it needs {_size(needed)}, {_size(free)} are free in "
            f"{parent}; free space or choose another disk (a bundle to be replaced is "
            "removed only when the new one is complete)"
        )


def as_output_error(
    error: BaseException,
    destination: Path,
    staging: Path | None,
    left: str = "nothing was left behind",
) -> OutputError | None:
    """Translate a failure to write `destination`; None for every other exception.

    Args:
        error: the exception.
        destination: the path that the user gave.
        staging: the hidden folder being written, or None if there is none yet. (Once there is one,
            other files are read, too, and their errors are not about writing.)
        left: what remains on disk, in words.
    """
    if not isinstance(error, OSError) or isinstance(error, NeoError):
        return None
    if staging is not None and not _is_about(error, staging):
        return None
    parent = staging.parent if staging is not None else _nearest_folder(destination)
    free = _free(parent)
    # numpy.ndarray.tofile reports a short write as an OSError without a number.
    if error.errno is None and free > _NEARLY_NOTHING:
        return None
    reason = error.strerror or str(error)
    if error.errno is None or error.errno in _FULL:
        advice = (
            f"{_size(_written(staging))} were written, {_size(free)} are free in {parent}; "
            "free space or choose another disk"
        )
    elif error.errno == errno.EFBIG:
        advice = "a file passed the size limit of the file system or of this process (ulimit -f)"
    elif error.errno == errno.EROFS:
        advice = f"{parent} is read-only; choose another folder"
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = f"you may not write in {parent}; choose another folder or change its permissions"
    else:
        advice = f"check {error.filename or parent}, or choose another folder"
    return OutputError(f"cannot write {destination}: {reason}; {advice}; {left}")


def _is_about(error: OSError, staging: Path) -> bool:
    if not isinstance(error.filename, str | bytes):
        return error.errno is None or error.errno in _ONLY_WRITING
    path = Path(os.fsdecode(error.filename)).absolute()
    return path == staging.parent or path.is_relative_to(staging)


def _nearest_folder(path: Path) -> Path:
    candidates = path.absolute().parents
    return next((p for p in candidates if os.path.isdir(p)), candidates[-1])  # noqa: PTH112


def _free(folder: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


def _written(staging: Path | None) -> int:
    total = 0
    for parent, _, names in os.walk(staging) if staging is not None else ():
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
