"""Where the installed command begins."""

from __future__ import annotations

import signal
import sys

from neo_runtime.entry import entry

__all__ = ["serve"]

_start = entry("neo_server.command")


def serve() -> int:
    """`neo-serve`; its exit status."""
    # Before slow imports: nothing else ends the first process of a container.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return _start()
