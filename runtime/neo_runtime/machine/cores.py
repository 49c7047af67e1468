"""How many processors and physical cores this process may use."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from neo_runtime.errors import RequestError
from neo_runtime.machine.cpu_quota import cpu_quota

__all__ = ["chosen_threads", "physical_cores", "usable_processors"]

_LOG = logging.getLogger("neo_runtime")
_MOST_A_PROCESSOR = 16


def chosen_threads(asked: int | None) -> int:
    """Number of compute threads: `asked`, or one per physical core if that is None.

    Raises:
        RequestError: more than 16 threads per processor: these wait for each other so much that a
            token would take minutes.
    """
    if asked is None:
        return physical_cores()
    processors = usable_processors()
    if asked > _MOST_A_PROCESSOR * processors:
        raise RequestError(
            f"threads is {asked}, but this process may use {processors} processors; expected at "
            f"most {_MOST_A_PROCESSOR * processors}, and {physical_cores()} (the default) is best"
        )
    if asked > processors:
        _LOG.warning(
            "%d threads on %d processors wait for each other; use %d (the default)",
            asked,
            processors,
            physical_cores(),
        )
    return asked


def usable_processors() -> int:
    """Number of processors (hardware threads) that this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows have none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Physical cores that this process may use: at least 1.

    Of two hardware threads of a core one is counted (matrix products gain nothing from the
    second), only processors of the affinity mask are, and the CPU quota of a container or service
    is a limit.
    """
    if not hasattr(os, "sched_getaffinity"):
        return usable_processors()
    processors = os.sched_getaffinity(0)
    cores = {_siblings(processor) for processor in processors}
    quota = cpu_quota()
    return max(1, min(len(cores), quota) if quota else len(cores))


def _siblings(processor: int) -> str:
    """An identifier shared by all hardware threads of a core."""
    path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return str(processor)
