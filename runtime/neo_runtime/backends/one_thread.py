"""Work that must always run in the same thread, whoever asks for it.

onnxruntime keeps handles of CUDA's libraries and captured graphs for each thread that ever ran a
session with CUDA graphs, until the session ends (`CUDAExecutionProvider::OnRunEnd`). A service with
a thread for each request would fill the GPU with them.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneThread"]


class OneThread:
    """The first caller's own thread, without any hand-over; a worker once another thread calls.

    One call runs at a time: callers hold a lock.
    """

    def __init__(self) -> None:
        self._mark = threading.local()
        self._is_taken = False
        self._worker: ThreadPoolExecutor | None = None

    def settle(self) -> int:
        """Decide where this caller's work runs: 0 its own thread, 1 the worker, from now on."""
        if self._worker is None:
            if not self._is_taken:
                self._is_taken = self._mark.mine = True
            # Not by the thread's number, which a later thread may get.
            if not getattr(self._mark, "mine", False):
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="neo-decode")
        return int(self._worker is not None)

    def run(self, work: Callable[[], None]) -> None:
        """Do `work`, and wait for its end."""
        self.settle()
        if self._worker is None:
            work()
            return
        future = self._worker.submit(work)
        while not future.done():
            try:
                wait((future,))
            except BaseException:  # Ctrl-C: nobody else may call before the work has ended
                wait((future,))
                raise
        future.result()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.shutdown(wait=False)
