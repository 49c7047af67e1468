"""Progress of a command line on stderr."""

from __future__ import annotations

import sys
from typing import Self

__all__ = ["StageLine"]


class StageLine:
    """Stages on stderr: one line each, rewritten in place on a terminal.

    A context manager: the last line is closed before anything else is written.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._stage = ""
        self._tenths = -1
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is; `total` is 0 where that is unknown."""
        tenths = 10 * done // total if total else -1
        if (stage, tenths) == (self._stage, self._tenths):
            return
        if stage != self._stage:
            self.end()
            self._stage = stage
        self._tenths = tenths
        text = f"{self._program}: {stage}" + (f" {10 * tenths} %" if total else "")
        if sys.stderr.isatty():
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif tenths in (-1, 10):
            print(text, file=sys.stderr)

    def end(self) -> None:
        """Close the line, before anything else is written."""
        if self._open:
            print(file=sys.stderr)
            self._open = False
