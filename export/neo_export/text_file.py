"""A text that the user asked for, in a file of the user's choice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_text_file"]


def write_text_file(path: Path, text: str) -> None:
    """Write a file, or replace it, whole or not at all.

    Raises:
        OutputError: writing failed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
