"""Collect TensorRT's log messages, so that errors of this package can include them."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

__all__ = ["logger_of", "messages_of"]

_KEPT = 1000
"""Most messages that are kept, so that a long-running server does not accumulate them."""


@cache
def logger_of(trt: Any) -> Any:
    """The logger for a module; one per process, because TensorRT keeps the first it is given.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
    """
    worst, shown = trt.ILogger.Severity.ERROR, trt.ILogger.Severity.WARNING

    class Collector(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings as pairs (is a warning, message)."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: deque[tuple[bool, str]] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity <= shown:
                self.kept.append((severity > worst, message.strip()))

    return Collector()


def messages_of(trt: Any, *, warnings: bool = True) -> list[str]:
    """The messages logged since the last call, without duplicates: errors, then warnings."""
    kept = logger_of(trt).kept
    found = sorted(kept, key=lambda pair: pair[0])
    kept.clear()
    return list(dict.fromkeys(text for warns, text in found if warnings or not warns))
