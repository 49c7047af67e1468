"""Progress of a command on stderr."""

from __future__ import annotations

import sys
import time
from typing import Self

__all__ = ["StageLine"]


_QUIET = 30.0
"""Seconds after which an unfinished stage gets another line in a log."""


class StageLine:
    """Shows stages on stderr.

    On a terminal each stage has one line, which is rewritten in place. Elsewhere a stage gets a
    line when it ends, and one every 30 seconds while it runs. As a context manager it ends the last
    line on exit.
    """

    def __init__(self, program: str, pace: str | None = None) -> None:
        """Print nothing yet.

        Args:
            program: name at the start of each line.
            pace: unit of speed, such as "positions/s", if one count continues through all stages.
                Lines then also show the speed and the estimated time left. None if each stage has
                its own count.
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
        """Show the progress of a stage: `done` of `total`; `total` is 0 if unknown."""
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
            # \033[K erases the rest of a longer previous text.
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self._open = True
        elif (
            percent in (-1, 100)
            # With a common count, stages before the last never reach 100 %.
            or (begins and self._pace is not None)
            or now - self._logged >= _QUIET
        ):
            print(text, file=sys.stderr, flush=True)
            self._logged = now

    def end(self) -> None:
        """End the current line, so that other output starts on a new one."""
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def _speed(self, done: int, total: int, now: float) -> str:
        """Speed and time left of a common count; empty on the first call."""
        if self._pace is None:
            return ""
        if self._began is None:
            self._began = now, done
            return ""
        since, first = self._began
        speed = (done - first) / max(now - since, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        return f", {speed:,.0f} {self._pace}, {left:,.0f} s left"
