"""Two atomic renames that `os` does not offer: one that never replaces, and one that swaps.

Linux: renameat2(2); macOS: renamex_np(2). Elsewhere, and on file systems that support neither,
`rename_exclusive` falls back on plain rename (which can replace only an *empty* folder), and
`exchange` returns False and does nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["exchange", "rename_exclusive"]

_AT_FDCWD = -100
_LINUX = {"exclusive": 1, "exchange": 2}  # RENAME_NOREPLACE, RENAME_EXCHANGE of <linux/fs.h>
_MACOS = {"exclusive": 4, "exchange": 2}  # RENAME_EXCL, RENAME_SWAP of <sys/stdio.h>
_NOT_OFFERED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def rename_exclusive(source: Path, target: Path) -> None:
    """Rename the folder `source` to `target`, which must not exist.

    Raises:
        FileExistsError: something is there (it is left as it was).
        OSError: any other failure of the system call.
    """
    if _native_rename(source, target, "exclusive"):
        return
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(
                errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target)
            ) from error
        raise


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step, so that neither is ever missing.

    Returns:
        False if the system or the file system does not support it; then nothing was changed.

    Raises:
        OSError: any other failure, such as FileNotFoundError where one of them is missing.
    """
    return _native_rename(first, second, "exchange")


def _native_rename(source: Path, target: Path, how: str) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    linux = getattr(libc, "renameat2", None) if sys.platform != "darwin" else None
    macos = getattr(libc, "renamex_np", None) if sys.platform == "darwin" else None
    if linux is not None:
        status = linux(_AT_FDCWD, old, _AT_FDCWD, new, ctypes.c_uint(_LINUX[how]))
    elif macos is not None:
        status = macos(old, new, ctypes.c_uint(_MACOS[how]))
    else:
        return False
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
