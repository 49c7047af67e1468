"""Peak memory of this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["PeakMemory"]

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.05  # seconds; tensors large enough to matter take longer to write


class PeakMemory:
    """Context manager that samples this process's memory every 50 ms.

    `rss` is the peak resident memory, `private` the peak of its anonymous part, both in bytes; 0 on
    systems without /proc.
    """

    def __init__(self) -> None:
        self.rss = 0
        self.private = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            return
        kib = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
        self.rss = max(self.rss, 1024 * int(kib.get("VmRSS", 0)))
        self.private = max(self.private, 1024 * int(kib.get("RssAnon", 0)))
