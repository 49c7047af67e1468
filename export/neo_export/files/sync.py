"""Syncs files and folders to the disk (fsync)."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["sync_directory", "sync_tree"]

_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP}


def sync_tree(folder: Path) -> None:
    """Sync every file below `folder`, and every folder's entries, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                _sync(path)
        sync_directory(Path(parent))


def sync_directory(path: Path) -> None:
    """Sync a folder's entries to the disk, on systems that support it."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
