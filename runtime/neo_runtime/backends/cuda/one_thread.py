"""Run work always in the same thread, whichever thread requests it.

onnxruntime keeps library handles and captured graphs for each thread that ran a session with CUDA
graphs, until the session is destroyed (`CUDAExecutionProvider::OnRunEnd`). A server with one thread
per request would fill the GPU's memory with them.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneThread"]


class OneThread:
    """Runs work in the first caller's thread; in a worker from the first call by another thread.

    Not thread-safe: callers hold a lock. The worker is a daemon thread, so that an idle worker does
    not keep the process alive, and threads that outlive the main thread can still call.
    """

    def __init__(self) -> None:
        self._mark = threading.local()
        self._is_taken = False
        self._jobs: SimpleQueue[_Job | None] | None = None

    def settle(self) -> int:
        """Decide where the work of the calling thread runs; start the worker if it is needed.

        Returns:
            0 for the first caller's own thread, 1 for the worker.
        """
        if self._jobs is None:
            if not self._is_taken:
                self._is_taken = self._mark.mine = True
            # A thread-local mark, because a later thread may reuse the identifier of an ended one.
            if not getattr(self._mark, "mine", False):
                jobs: SimpleQueue[_Job | None] = SimpleQueue()
                threading.Thread(
                    target=_serve, args=(jobs,), name="neo-decode", daemon=True
                ).start()
                self._jobs = jobs
        return int(self._jobs is not None)

    def run(self, work: Callable[[], None]) -> None:
        """Run `work` and wait until it has ended, even after Ctrl-C; raises what it raises."""
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
        """End the worker thread."""
        if self._jobs is not None:
            self._jobs.put(None)


class _Job:
    """One piece of work for the worker."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._state = threading.Lock()
        self._has_begun = self._is_abandoned = False
        self._done = threading.Event()
        self._error: BaseException | None = None

    def do(self) -> None:
        """Run the work, unless it was abandoned; called in the worker."""
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
        """Wait until the work has ended."""
        self._done.wait()

    def abandon(self) -> None:
        """Cancel the work; if it has begun, wait until it has ended, ignoring interrupts."""
        with self._state:
            self._is_abandoned = True
        while self._has_begun and not self._done.is_set():
            try:
                self._done.wait()
            except BaseException:
                continue

    def raise_error(self) -> None:
        """Raise the exception that the work raised, if any."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # breaks a reference cycle through its traceback


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.do()
        del job
