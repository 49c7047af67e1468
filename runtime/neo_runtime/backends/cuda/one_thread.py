"""Work that must always run in the same thread, whoever asks for it.

onnxruntime keeps handles of CUDA's libraries and captured graphs for each thread that ever ran a
session with CUDA graphs, until the session ends (`CUDAExecutionProvider::OnRunEnd`). A service with
a thread for each request would fill the GPU with them.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneThread"]


class OneThread:
    """The first caller's own thread, without any hand-over; a worker once another thread calls.

    One call runs at a time: callers hold a lock. The worker is a daemon, so that threads which
    outlive the main one can still call, and an idle worker does not hold up the process's end.
    """

    def __init__(self) -> None:
        self._mark = threading.local()
        self._is_taken = False
        self._jobs: SimpleQueue[_Job | None] | None = None

    def settle(self) -> int:
        """Decide where this caller's work runs: 0 its own thread, 1 the worker, from now on."""
        if self._jobs is None:
            if not self._is_taken:
                self._is_taken = self._mark.mine = True
            # Not by the thread's number, which a later thread may get.
            if not getattr(self._mark, "mine", False):
                jobs: SimpleQueue[_Job | None] = SimpleQueue()
                threading.Thread(
                    target=_serve, args=(jobs,), name="neo-decode", daemon=True
                ).start()
                self._jobs = jobs
        return int(self._jobs is not None)

    def run(self, work: Callable[[], None]) -> None:
        """Do `work`, and wait for its end, Ctrl-C or not: nobody else may call before."""
        self.settle()
        if self._jobs is None:
            work()
            return
        job = _Job(work)
        try:
            self._jobs.put(job)
            job.wait()
        except BaseException:
            job.abandon()
            raise
        job.raise_error()

    def close(self) -> None:
        """End the worker."""
        if self._jobs is not None:
            self._jobs.put(None)


class _Job:
    """One call of the worker."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._state = threading.Lock()
        self._has_begun = self._is_abandoned = False
        self._done = threading.Event()
        self._error: BaseException | None = None

    def do(self) -> None:
        """In the worker."""
        with self._state:
            if self._is_abandoned:
                return
            self._has_begun = True
        try:
            self._work()
        except BaseException as error:  # the caller raises it
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Until the work has ended."""
        self._done.wait()

    def abandon(self) -> None:
        """Do not begin; if it has begun, wait for its end through any further interrupt."""
        with self._state:
            self._is_abandoned = True
        while self._has_begun and not self._done.is_set():
            try:
                self._done.wait()
            except BaseException:
                continue

    def raise_error(self) -> None:
        """What the work has raised."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.do()
        del job
