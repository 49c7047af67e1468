"""Memory figures of this process from Linux's /proc."""

from __future__ import annotations

import mmap
from pathlib import Path

__all__ = ["private_bytes", "resident_pages"]


def resident_pages(path: Path) -> int:
    """How many pages of a file this process has mapped and in memory."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    total = 0
    for line in lines:
        if line.endswith(f" {path}"):
            total += next(int(row.split()[1]) for row in lines if row.startswith("Rss:"))
    return 1024 * total // mmap.PAGESIZE


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
