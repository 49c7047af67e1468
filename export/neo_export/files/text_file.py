"""A text that the user asked for, in a file of the user's choice."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from neo_runtime.errors import OutputError

__all__ = ["write_text_file"]


def write_text_file(path: Path, text: str) -> None:
    """Write a file, or replace it, whole or not at all.

    A link stays a link: its target is replaced. Other things than files (a pipe), and this process'
    own output (`/dev/stdout`, wherever it goes), are written to as they are.

    Raises:
        OutputError: writing failed.
    """
    if path.exists() and (stream := _output(path)) is not None:
        (sys.stdout, sys.stderr)[stream - 1].flush()
        # The same place in the file as the stream's own, which continues writing after this.
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
    """Whether a file is what stdout (1) or stderr (2) goes to."""
    status = path.stat()
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.fstat(stream)):
                return stream
    return None
