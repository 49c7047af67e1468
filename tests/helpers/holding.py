"""Blocks the scheduler's thread while a test submits requests."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_runtime import Scheduler
    from neo_runtime.scheduling.pending import PendingCompletion


@contextmanager
def holding(scheduler: Scheduler, prompt: Any, **options: Any) -> Iterator[PendingCompletion]:
    """A request whose callback blocks the thread until the end of the with block.

    It is taken alone. Requests submitted in the block are then taken together, after it, however
    the system schedules the threads.
    """
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> bool:
        inside.set()
        assert go_on.wait(timeout=60)
        return False

    held = scheduler.submit(prompt, should_stop=hold, **options)
    assert inside.wait(timeout=60)
    try:
        yield held
    finally:
        go_on.set()
