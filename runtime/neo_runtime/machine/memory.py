"""How much more memory this process can use, by the machine and its control groups."""

from __future__ import annotations

from pathlib import Path

from neo_runtime.machine.control_groups import control_groups

__all__ = ["available_memory"]

_ENDLESS = 2**60
"""Limits from this number on mean "no limit" in version 1 of control groups."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still use, including reclaimable page cache.

    This is the minimum of the machine's MemAvailable and of what is left in the process's control
    group and its parents; a container that exceeds its limit is killed.

    Args:
        root: the folder that contains /proc and the mounted groups; tests use another one.

    Returns:
        None if it is unknown.
    """
    left = [_of_group(group) for group in control_groups("memory", root)]
    left.append(_of_machine(root))
    return min((one for one in left if one is not None), default=None)


def _of_machine(root: Path) -> int | None:
    found = _fields(root / "proc/meminfo").get("MemAvailable:")
    return None if found is None else found * 1024


def _of_group(group: Path) -> int | None:
    """Bytes left in one group; None if it has no limit."""
    statistics = _fields(group / "memory.stat")
    for limit, used, files in (
        ("memory.max", "memory.current", "file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None and most < _ENDLESS:
            return max(0, most - max(0, now - statistics.get(files, 0)))
    return None


def _fields(path: Path) -> dict[str, int]:
    """The numbers in a file whose lines begin with a name and a number, by name."""
    found = {}
    try:
        for line in path.read_text().splitlines():
            name, number, *_ = [*line.split(), "", ""]
            if number.isdecimal():
                found[name] = int(number)
    except (OSError, ValueError):
        return {}
    return found


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" or if it cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
