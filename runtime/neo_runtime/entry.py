"""Entry points of the installed commands; they import little before Ctrl-C is handled."""

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
    """A function for a console script: it imports a module and calls its `main`.

    Imports take long enough to be interrupted, so Ctrl-C is handled during imports as well: the
    command ends without a traceback.

    Args:
        module: name of the command's module.
        heeds_sigterm: exit on SIGTERM from the beginning. The first process of a container needs a
            handler for this: the system does not deliver it signals that it has no handler for.
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
