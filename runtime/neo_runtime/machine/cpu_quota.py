"""How many processors Linux control groups grant this process: containers, systemd's CPUQuota=."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cpu_quota"]


def cpu_quota(root: Path = Path("/")) -> int | None:
    """The least quota of the process's group and of those around it, rounded up: at least 1.

    Args:
        root: where /proc and the mounted groups are looked for; tests have a tree of their own.

    Returns:
        None without a limit, and where the system says nothing.
    """
    limits = [limit for group in _groups(root) if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders that may hold a quota, from the process's group up to where its tree is mounted."""
    places = _places(root)
    for version, top, mount in _mounts(root):
        if version not in places:
            continue
        folder = root / mount.relative_to("/")
        place = PurePosixPath(places[version])
        # A container sees a part of the tree, and may be told its place in the whole one.
        inside = place.relative_to(top) if place.is_relative_to(top) else PurePosixPath()
        if ".." in inside.parts:  # outside what this namespace shows
            inside = PurePosixPath()
        yield from (folder / part for part in (inside, *inside.parents))


def _places(root: Path) -> dict[int, str]:
    """Version of control groups → the process's place in the tree that limits processors."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = place
        elif "cpu" in controllers.split(","):
            found[1] = place
    return found


def _mounts(root: Path) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """Version, the part of the tree that is mounted, and where: see proc_pid_mountinfo(5)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *more) = before.split(), after.split() or [""]
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version is None or len(fields) < 5:
            continue
        if version == 2 or "cpu" in more[-1].split(","):
            yield version, PurePosixPath(fields[3]), PurePosixPath(fields[4])


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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
