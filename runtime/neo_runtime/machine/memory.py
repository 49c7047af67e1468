"""How much more memory this process may have: of the machine, and of its control groups."""

from __future__ import annotations

from pathlib import Path

from neo_runtime.machine.control_groups import control_groups

__all__ = ["available_memory"]

_ENDLESS = 2**60
"""Version 1 of control groups says so by a number from here on."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken, what caches of files hold included.

    The least of what the machine has (MemAvailable) and of what is left in the process's control
    group and in those around it: what is beyond ends a container.

    Args:
        root: where /proc and the mounted groups are looked for; tests have a tree of their own.

    Returns:
        None where the system says nothing.
    """
    left = [_of_group(group) for group in control_groups("memory", root)]
    left.append(_of_machine(root))
    return min((one for one in left if one is not None), default=None)


def _of_machine(root: Path) -> int | None:
    found = _fields(root / "proc/meminfo").get("MemAvailable:")
    return None if found is None else found * 1024


def _of_group(group: Path) -> int | None:
    """What a group may still take; None without a limit."""
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
    """Lines that begin with a name and a number."""
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
    """None for `max`, and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
