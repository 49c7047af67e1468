"""A text that the user asked for, in a file of the user's choice."""

from __future__ import annotations

import os
from pathlib import Path

from neo_runtime.errors import OutputError

__all__ = ["write_text_file"]


def write_text_file(path: Path, text: str) -> None:
    """Write a file, or replace it, whole or not at all.

    A link stays one: what it leads to is replaced. What is no file (a pipe, `/dev/stdout`) is
    written to as it is.

    Raises:
        OutputError: writing failed.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
