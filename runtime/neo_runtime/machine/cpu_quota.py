"""The CPU quota of this process by Linux control groups (containers, systemd's CPUQuota=)."""

from __future__ import annotations

from pathlib import Path

from neo_runtime.machine.control_groups import control_groups

__all__ = ["cpu_quota"]


def cpu_quota(root: Path = Path("/")) -> int | None:
    """The smallest quota of the process's control group and its parents.

    Args:
        root: the folder that contains /proc and the mounted groups; tests use another one.

    Returns:
        Processors, rounded up, at least 1; None if there is no limit or it is unknown.
    """
    limits = [
        limit for group in control_groups("cpu", root) if (limit := _limit(group)) is not None
    ]
    return min(limits, default=None)


def _limit(group: Path) -> int | None:
    """The quota of one group in processors, rounded up; None if there is no limit."""
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
