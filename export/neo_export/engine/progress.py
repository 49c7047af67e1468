"""TensorRT's progress monitor, reported as the stages of a command."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from neo_export.engine.flavour import Flavour

__all__ = ["kept_interrupt", "progress_monitor"]


@contextmanager
def kept_interrupt() -> Iterator[threading.Event]:
    """Record Ctrl-C in an event instead of raising it: NVIDIA's code drops callbacks' exceptions.

    Does nothing outside the main thread, which alone handles signals, and if SIGINT is ignored
    (background jobs) or its handler was not installed by Python.
    """
    seen = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (None, signal.SIG_IGN):
        yield seen
        return
    signal.signal(signal.SIGINT, lambda *_: seen.set())
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def progress_monitor(
    flavour: Flavour, say: Callable[[str, int, int], None], interrupted: threading.Event
) -> Any:
    """An `IProgressMonitor` that calls `say(phase, steps done, total steps)`.

    Only phases of the two outer levels are reported; inner ones take milliseconds. An exception in
    `say` is stored in `monitor.failure` and stops the build, as does setting `interrupted`.
    """
    monitor_class: Any = flavour.module.IProgressMonitor

    class Monitor(monitor_class):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.top: str | None = None
            self.failure: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.top = phase
            if not parent or parent == self.top:
                self.steps[phase] = steps
                self._say(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                self._say(phase, step + 1)
            return self.failure is None and not interrupted.is_set()

        def phase_finish(self, phase: str) -> None:
            if phase in self.steps:
                self._say(phase, self.steps.pop(phase))

        def _say(self, phase: str, done: int) -> None:
            try:
                say(f"TensorRT: {phase}", done, self.steps.get(phase, done))
            except BaseException as error:  # must not cross NVIDIA's C++ frames
                self.failure = error

    return Monitor()
