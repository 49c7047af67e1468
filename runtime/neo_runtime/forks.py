"""What runs in a forked child before anything else.

Only the thread that called `fork` exists in the child: locks held by other threads are never
released there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_every_child"]


def in_every_child(work: Callable[[], None]) -> None:
    """Call `work` in each child process forked from now on, in the order of registration."""
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=work)
