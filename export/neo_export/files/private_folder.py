"""The hidden folder in which a folder is written before it is renamed to its final name.

    parent/
        .NAME.partial-<pid>-<random>/     hidden, private to one export
            lock                          flock'd as long as that export lives
            new/                          what is written
            old/                          only without an atomic swap: see `swap_in`
        NAME/                             whole at every instant, or nothing

A killed export leaves its hidden folder. The next export to the same destination finds that no
process holds its lock, and removes it. (It checks the lock, not the pid: pids are reused.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from neo_export.files.renames import exchange, rename_exclusive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["NEW", "private_folder", "swap_in", "tidy_up"]

NEW = "new"
"""Name of the folder inside the hidden one that is written."""
_LOCK, _OLD = "lock", "old"
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def private_folder(target: Path) -> Iterator[Path]:
    """The hidden folder beside `target`, its lock held, with an empty `new` inside."""
    made = None
    while made is None:
        made = _make_private_folder(target)
    root, lock = made
    try:
        (root / NEW).mkdir()
        yield root
    finally:
        _remove(root, target)
        os.close(lock)


def _make_private_folder(target: Path) -> tuple[Path, int] | None:
    """Create and lock it; None if another export removed it as a leftover before it was locked."""
    name = f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    root = target.with_name(name)
    root.mkdir(mode=0o700)
    try:
        lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileNotFoundError:
        return None
    except BaseException:
        root.rmdir()
        raise
    if _try_lock(lock) is not False and _is_same_file(lock, root / _LOCK):
        return root, lock
    os.close(lock)
    return None


def swap_in(root: Path, target: Path) -> None:
    """Replace `target` with the written folder.

    Without an atomic swap this takes two renames, and between them `target` does not exist. If the
    second one fails, `_remove` puts the old bundle back; if the process is killed between them, the
    next export to `target` does so (`tidy_up`).
    """
    if exchange(root / NEW, target):
        return
    target.rename(root / _OLD)
    rename_exclusive(root / NEW, target)


def tidy_up(target: Path) -> None:
    """Remove leftovers of killed exports to `target`; put back an old bundle that one moved."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9]+-[0-9a-f]{{8}}")
    try:
        names = sorted(n for n in os.listdir(target.parent) if pattern.fullmatch(n))  # noqa: PTH208
    except OSError:  # The parent may be writable but not listable: the leftovers stay.
        return
    for name in names:
        root = target.with_name(name)
        if root.is_symlink():
            continue
        try:
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            with suppress(OSError):  # An empty folder: killed before it was locked. Else not ours.
                root.rmdir()
            continue
        try:
            if _try_lock(lock) and _is_same_file(lock, root / _LOCK):
                _remove(root, target)
        finally:
            os.close(lock)


def _remove(root: Path, target: Path) -> None:
    """Remove a hidden folder whose lock is held; put back an old bundle if nothing replaced it.

    The lock is removed last, so that the next export finishes an interrupted removal.
    """
    old = root / _OLD
    with suppress(OSError):
        rename_exclusive(old, target)
    if old.exists() and not os.path.lexists(target):  # The only copy: never delete it.
        return
    for part in (root / NEW, old):
        shutil.rmtree(part, ignore_errors=True)
        if part.exists():
            return
    with suppress(OSError):
        (root / _LOCK).unlink(missing_ok=True)
        root.rmdir()


def _try_lock(lock: int) -> bool | None:
    """True: held now. False: another process holds it. None: this file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
