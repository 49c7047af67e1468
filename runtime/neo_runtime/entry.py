"""Where installed commands begin: little is imported before Ctrl-C finds somebody to catch it."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["entry", "generate", "verify"]

_INTERRUPTED = 130


def entry(module: str, *, heeds_sigterm: bool = False) -> Callable[[], int]:
    """The function of a console script: `main` of a module that is imported only then.

    Imports take long enough to be interrupted; Ctrl-C ends them as it ends the work, without a
    traceback.

    Args:
        module: the command's.
        heeds_sigterm: from the beginning, also as the first process of a container, which the
            system ends by no signal that it has no handler for.
    """

    def start() -> int:
        try:
            if heeds_sigterm:
                signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            from neo_runtime.command.standard_streams import prepare_streams

            prepare_streams()
            status: int = importlib.import_module(module).main()
        except KeyboardInterrupt:
            return _INTERRUPTED
        return status

    return start


generate = entry("neo_runtime.command.generate")
verify = entry("neo_runtime.command.verify")
