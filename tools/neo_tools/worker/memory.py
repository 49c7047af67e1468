"""Bytes of a process as Linux counts them. Standard library only."""

from __future__ import annotations

from pathlib import Path

__all__ = ["memory_of", "resident_of"]


def resident_of(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process that are in memory; cheap, so that it may be polled.

    Returns:
        rss (all resident), rss_anon (private: not backed by a file); 0 for a process that has
        ended and was not waited for.

    Raises:
        OSError: no such process, or no Linux /proc.
    """
    status = _kilobytes(Path(f"/proc/{pid}/status"), ("VmRSS", "RssAnon"))
    return {"rss": status["VmRSS"], "rss_anon": status["RssAnon"]}


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """The same, and what of shared pages falls to the process.

    Returns:
        rss and rss_anon, see `resident_of`, and pss (shared pages divided by the number of
        processes that map them).

    Raises:
        OSError: no such process, or no Linux /proc.
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
