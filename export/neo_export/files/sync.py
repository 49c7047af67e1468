"""What was written is on the disk, not only in the system's memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["sync_directory", "sync_tree"]

_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP}


def sync_tree(folder: Path) -> None:
    """Wait until every file below `folder`, and every folder's list of names, is on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                _sync(path)
        sync_directory(Path(parent))


def sync_directory(path: Path) -> None:
    """Wait until a folder's list of names is on the disk; some systems cannot be asked to."""
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
