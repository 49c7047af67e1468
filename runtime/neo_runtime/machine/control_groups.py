"""Find the Linux control groups of this process, by which containers and systemd set limits."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["control_groups"]


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders that may contain a limit: from the process's group up to the mount point.

    Args:
        controller: "cpu" or "memory".
        root: the folder that contains /proc and the mounted groups; tests use another one.
    """
    places = _places(controller, root)
    for version, top, mount in _mounts(controller, root):
        if version not in places:
            continue
        folder = root / mount.relative_to("/")
        place = PurePosixPath(places[version])
        # A container may see only a part of the tree, but its path in the whole tree.
        inside = place.relative_to(top) if place.is_relative_to(top) else PurePosixPath()
        if ".." in inside.parts:  # outside of this namespace
            inside = PurePosixPath()
        yield from (folder / part for part in (inside, *inside.parents))


def _places(controller: str, root: Path) -> dict[int, str]:
    """The process's paths in the control group trees, by version (1 or 2) of control groups."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = place
        elif controller in controllers.split(","):
            found[1] = place
    return found


def _mounts(controller: str, root: Path) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """Version, root of the mounted part of the tree, and mount point: proc_pid_mountinfo(5)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *more) = before.split(), after.split() or [""]
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version is None or len(fields) < 5:
            continue
        if version == 2 or controller in more[-1].split(","):
            yield version, PurePosixPath(fields[3]), PurePosixPath(fields[4])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
