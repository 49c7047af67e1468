"""Prepare standard streams for a command line, however it was started."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["json_text", "prepare_streams"]


def prepare_streams() -> None:
    """Make sure that writing to stdout and stderr does not fail.

    A closed stream, as cron and daemons may leave it, is redirected to the null device; a closed
    stdin remains None. Characters that stdout's encoding lacks become `?`. Idempotent.
    """
    _take_numbers()
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in (
        "strict",
        "surrogateescape",
    ):
        sys.stdout.reconfigure(errors="replace")


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON for stdout: as it is if stdout is UTF-8, else escaped, so that nothing is lost."""
    import json

    return json.dumps(value, indent=indent, ensure_ascii=not _is_utf8(sys.stdout))


def _take_numbers() -> None:
    """Occupy the descriptors of closed streams: a file opened later would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free; workers get it, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _is_utf8(stream: TextIO) -> bool:
    try:
        return codecs.lookup(stream.encoding).name == "utf-8"
    except (AttributeError, LookupError, TypeError):
        return False
