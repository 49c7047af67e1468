"""A folder that appears whole or not at all.

`staged_folder` gives its caller an empty folder, and puts it in place under its final name once
everything is written and on the disk:

    parent/
        .NAME.partial-<pid>-<random>/     hidden, private to one export
            lock                          flock'd as long as that export lives
            new/                          what the caller writes
            old/                          only without an atomic swap: see `_swap_in`
        NAME/                             a whole bundle at every instant, or nothing

An export that is killed leaves its hidden folder. The next export to the same destination
finds that nobody holds its lock any more and removes it. (A lock, not the pid: pids are reused.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import OutputError
from neo_runtime.manifest import MANIFEST_NAME

from neo_export.file_records import copy_file, record_file, record_files, write_file
from neo_export.foreign_files import foreign_files
from neo_export.output_errors import as_output_error, require_space
from neo_export.renames import exchange, rename_exclusive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = [
    "check_destination",
    "copy_file",
    "record_file",
    "record_files",
    "staged_folder",
    "sync_tree",
    "termination_raises",
    "write_file",
]

_LOCK, _NEW, _OLD = "lock", "new", "old"
_SHOWN = 5
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def staged_folder(destination: Path, *, force: bool, needed: int = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends normally.

    When the block raises, everything written is removed and what was at `destination` stays as it
    was. That includes KeyboardInterrupt, and a SIGTERM or SIGHUP, which are turned into
    `SystemExit` meanwhile unless the program handles them itself. An OSError that is about
    writing becomes an `OutputError`; every other exception passes as it is.

    Args:
        destination: where the folder shall appear. Its parent must exist. A symbolic link is
            followed: the folder that it names is written, the link stays.
        force: replace a bundle, or an empty folder, that is there already; a bundle with files
            that are not its own (plans aside) is left alone.
        needed: bytes that will be written, where known: too small a disk is then an error now.

    Raises:
        OutputError: there is something at `destination` that may not be replaced, or writing
            failed (disk full, quota, no permission, read-only file system).
    """
    destination = Path(destination)
    root: Path | None = None
    with termination_raises():
        try:
            target = _checked_target(destination, force=force)
            if needed:
                require_space(destination, target.parent, needed)
            with _private_folder(target) as root:
                try:
                    yield root / _NEW
                    sync_tree(root / _NEW)
                    _put_in_place(root, target, force=force)
                except OSError as error:  # Here, while what was written can still be measured.
                    if failure := as_output_error(error, destination, root):
                        raise failure from error
                    raise
        except OSError as error:
            if root is None and (failure := as_output_error(error, destination, None)):
                raise failure from error
            raise


def check_destination(destination: Path, *, force: bool) -> None:
    """Raise at once what `staged_folder` would: for work that is long before it writes.

    Raises:
        OutputError: there is something that may not be replaced, or no folder to write in.
    """
    _checked_target(Path(destination), force=force)


def sync_tree(folder: Path) -> None:
    """Wait until every file below `folder`, and every folder's list of names, is on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                _sync(path)
        _sync_directory(Path(parent))


def _checked_target(destination: Path, *, force: bool) -> Path:
    """Follow links, tidy up after killed exports, refuse what may not be replaced."""
    target = Path(os.path.realpath(destination))
    parent = target.parent
    if not parent.exists():
        raise OutputError(f"cannot write {destination}: there is no folder {parent}; make it first")
    if not parent.is_dir():
        raise OutputError(f"cannot write {destination}: {parent} is not a folder")
    _tidy_up(target)
    if os.path.lexists(target):
        _refuse_unless_replaceable(target, destination)
        if not force:
            raise OutputError(f"{destination} exists already; use --force to replace it")
        _refuse_to_lose(target, destination)
    return target


def _refuse_unless_replaceable(target: Path, destination: Path) -> None:
    if not target.is_dir():
        what = "it is not a folder"
    elif any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        what = f"it is a folder with contents and no {MANIFEST_NAME}"
    elif target.is_mount():
        what = "it is a mount point; write to a folder inside it"
    else:
        return
    raise OutputError(
        f"{destination} is not a bundle, refusing to replace it ({what}); choose another path"
    )


def _refuse_to_lose(target: Path, destination: Path) -> None:
    """Whoever replaces a bundle means the bundle, not notes that were put beside its files."""
    names = foreign_files(target)
    if not names:
        return
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise OutputError(
        f"{destination} holds files that are not the bundle's and would be lost: {shown}{more}; "
        "move them out of it, or choose another path"
    )


@contextmanager
def _private_folder(target: Path) -> Iterator[Path]:
    """The hidden folder beside `target`, its lock held, with an empty `new` inside."""
    made = None
    while made is None:
        made = _make_private_folder(target)
    root, lock = made
    try:
        (root / _NEW).mkdir()
        yield root
    finally:
        _remove(root, target)
        os.close(lock)


def _make_private_folder(target: Path) -> tuple[Path, int] | None:
    """Make and lock it; None if another export took it for a leftover in between."""
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


def _put_in_place(root: Path, target: Path, *, force: bool) -> None:
    new = root / _NEW
    try:
        rename_exclusive(new, target)
    except FileExistsError:
        if not force:
            raise OutputError(
                f"{target} appeared while the bundle was being written and was left alone; "
                "use --force to replace it"
            ) from None
        _refuse_unless_replaceable(target, target)
        _refuse_to_lose(target, target)
        if not exchange(new, target):
            _swap_in(root, target)
    _sync_directory(root)
    _sync_directory(target.parent)


def _swap_in(root: Path, target: Path) -> None:
    """Replace `target` in two renames, for systems without an atomic swap.

    Between the two there is nothing at `target`. When the second one fails `_remove` puts the old
    bundle back; after a kill just there the next export to `target` does (`_tidy_up`).
    """
    target.rename(root / _OLD)
    rename_exclusive(root / _NEW, target)


def _tidy_up(target: Path) -> None:
    """Remove what killed exports to `target` left; put back an old bundle that one took away."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9]+-[0-9a-f]{{8}}")
    try:
        names = sorted(n for n in os.listdir(target.parent) if pattern.fullmatch(n))  # noqa: PTH208
    except OSError:  # A parent that may be written but not listed: the leftovers stay.
        return
    for name in names:
        root = target.with_name(name)
        if root.is_symlink():
            continue
        try:
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            with suppress(OSError):  # Killed before it had a lock: empty. Otherwise not ours.
                root.rmdir()
            continue
        try:
            if _try_lock(lock) and _is_same_file(lock, root / _LOCK):
                _remove(root, target)
        finally:
            os.close(lock)


def _remove(root: Path, target: Path) -> None:
    """Remove a hidden folder whose lock is held; put back an old bundle if nothing replaced it.

    The lock goes last: a removal cut short is then finished by the next export.
    """
    old = root / _OLD
    with suppress(OSError):
        rename_exclusive(old, target)
    if old.exists() and not os.path.lexists(target):  # The only copy: never delete it.
        return
    for part in (root / _NEW, old):
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


@contextmanager
def termination_raises() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program through `SystemExit`, so that `finally` blocks run."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, stop)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
