"""Parsing of JSON from users."""

from __future__ import annotations

import errno
import json
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["parse_json", "read_json_file"]

_LARGEST = 1 << 26
"""Bytes: more than any JSON file of this project has, and little enough to read."""


def parse_json(text: str | bytes | bytearray, **options: Any) -> Any:
    """`json.loads`, with all errors raised as `ValueError`.

    Raises:
        ValueError: the text is not JSON, is not encoded as Unicode, or is nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json_file(path: Path) -> bytes:
    """The contents of a file at a path that a user gave.

    Raises:
        OSError: it cannot be read, is too large, or is a pipe or a device, which may never end.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    if facts.st_size > _LARGEST:
        raise OSError(
            errno.EFBIG, f"it has {facts.st_size} bytes, expected at most {_LARGEST}", str(path)
        )
    return path.read_bytes()
