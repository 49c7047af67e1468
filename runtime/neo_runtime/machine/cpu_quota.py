"""How many processors Linux control groups grant this process: containers, systemd's CPUQuota=."""

from __future__ import annotations

from pathlib import Path

from neo_runtime.machine.control_groups import control_groups

__all__ = ["cpu_quota"]


def cpu_quota(root: Path = Path("/")) -> int | None:
    """The least quota of the process's group and of those around it, rounded up: at least 1.

    Args:
        root: where /proc and the mounted groups are looked for; tests have a tree of their own.

    Returns:
        None without a limit, and where the system says nothing.
    """
    limits = [
        limit for group in control_groups("cpu", root) if (limit := _limit(group)) is not None
    ]
    return min(limits, default=None)


def _limit(group: Path) -> int | None:
    """Processors that one group grants, rounded up."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        time = -1 if quota == "max" else int(quota)
        return max(1, -(-time // int(period))) if time > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
