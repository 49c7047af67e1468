"""Writes a text to the file that the user named."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from neo_runtime.errors import OutputError

__all__ = ["write_text_file"]


def write_text_file(path: Path, text: str) -> None:
    """Write or replace a file atomically.

    A link stays a link: its target is replaced. What is not a regular file (such as a pipe), and
    this process's own output (`/dev/stdout`, wherever it goes), is written to directly.

    Raises:
        OutputError: writing failed.
    """
    if path.exists() and (stream := _output(path)) is not None:
        (sys.stdout, sys.stderr)[stream - 1].flush()
        # Shares the file offset with the stream, which continues after this text.
        with os.fdopen(os.dup(stream), "w", encoding="utf-8") as file:
            file.write(text)
        return
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


def _output(path: Path) -> int | None:
    """1 or 2 if stdout or stderr goes to this file; otherwise None."""
    status = path.stat()
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.fstat(stream)):
                return stream
    return None
