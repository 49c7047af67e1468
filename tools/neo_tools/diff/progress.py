"""Reports the progress of a comparison."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Count", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, done and total."""


class Count:
    """Counts the work done in one stage, and reports it."""

    def __init__(self, stage: str, total: int, say: Progress) -> None:
        self._stage, self._total, self._say, self._done = stage, total, say, 0
        say(stage, 0, total)

    def __call__(self, done: int) -> None:
        """Add to the work done."""
        self._done = min(self._total, self._done + done)
        self._say(self._stage, self._done, self._total)
