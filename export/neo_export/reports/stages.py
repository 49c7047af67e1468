"""Progress of a command line on stderr."""

from __future__ import annotations

import sys
import time
from typing import Self

__all__ = ["StageLine"]


_QUIET = 30.0
"""Seconds after which a log has another line of a stage that is not done."""


class StageLine:
    """Stages on stderr: a line each, rewritten in place on a terminal; more in a log if they last.

    A context manager: the last line is closed before anything else is written.
    """

    def __init__(self, program: str, pace: str | None = None) -> None:
        """Begin with nothing on stderr.

        Args:
            program: what each line begins with.
            pace: the unit of speed, such as "positions/s", where one count goes on through all
                stages: lines then say it, and how long the rest takes. None where each stage has
                a count of its own.
        """
        self._program = program
        self._pace = pace
        self._began: tuple[float, int] | None = None
        self._stage = ""
        self._percent = -1
        self._open = False
        self._logged = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is; `total` is 0 where that is unknown."""
        percent = 100 * done // total if total else -1
        if (stage, percent) == (self._stage, self._percent):
            return
        begins, now = stage != self._stage, time.monotonic()
        if begins:
            self.end()
            self._logged = now
        self._stage, self._percent = stage, percent
        text = f"{self._program}: {stage}"
        if total:
            text += f", {percent} %{self._speed(done, total, now)}"
        if sys.stderr.isatty():
            # The rest of a longer text before it is erased.
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self._open = True
        elif (
            percent in (-1, 100)
            # A stage of a common count ends where the next begins: it would never be at 100 %.
            or (begins and self._pace is not None)
            or now - self._logged >= _QUIET
        ):
            print(text, file=sys.stderr, flush=True)
            self._logged = now

    def end(self) -> None:
        """Close the line, before anything else is written."""
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def _speed(self, done: int, total: int, now: float) -> str:
        """Speed and what is left of a common count; nothing at its first look."""
        if self._pace is None:
            return ""
        if self._began is None:
            self._began = now, done
            return ""
        since, first = self._began
        speed = (done - first) / max(now - since, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        return f", {speed:,.0f} {self._pace}, {left:,.0f} s left"
