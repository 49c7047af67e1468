"""Memory of a process in bytes, as Linux counts it. Uses only the standard library."""

from __future__ import annotations

from pathlib import Path

__all__ = ["memory_of", "resident_of"]


def resident_of(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process; cheap enough for polling.

    Args:
        pid: process id; by default this process.

    Returns:
        `rss` (all resident memory) and `rss_anon` (the part not backed by a file), in bytes; 0 for
        a process that has ended but was not waited for.

    Raises:
        OSError: the process does not exist, or the system is not Linux.
    """
    status = _kilobytes(Path(f"/proc/{pid}/status"), ("VmRSS", "RssAnon"))
    return {"rss": status["VmRSS"], "rss_anon": status["RssAnon"]}


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process, and its share of shared pages.

    Args:
        pid: process id; by default this process.

    Returns:
        `rss` and `rss_anon` of `resident_of`, and `pss` (each shared page divided by the number of
        processes that map it), in bytes.

    Raises:
        OSError: the process does not exist, or the system is not Linux.
    """
    rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), ("Pss",))
    return {**resident_of(pid), "pss": rollup["Pss"]}


def _kilobytes(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    found = dict.fromkeys(names, 0)
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return found
