"""What a forked child does before anything else.

Only the thread that forked goes on in the child: nobody releases what others held.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_every_child"]


def in_every_child(work: Callable[[], None]) -> None:
    """Call `work` in each process that is forked off from now on, in the order of these calls."""
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=work)
