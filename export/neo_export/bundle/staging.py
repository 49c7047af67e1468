"""Puts a bundle's folder in place atomically, and replaces nothing that is not a bundle.

`staged_folder` gives its caller an empty folder, and renames it to its final name once everything
is written and synced to disk.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import MANIFEST_NAME
from neo_runtime.errors import OutputError

from neo_export.bundle.foreign_files import foreign_files
from neo_export.files.lost_files import refuse_to_lose
from neo_export.files.output_errors import as_output_error, require_space
from neo_export.files.private_folder import NEW, private_folder, swap_in, tidy_up
from neo_export.files.renames import rename_exclusive
from neo_export.files.sync import sync_directory, sync_tree
from neo_export.files.termination import termination_raises

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_destination", "staged_folder"]


@contextmanager
def staged_folder(destination: Path, *, force: bool, needed: int = 0) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends normally.

    If the block raises, everything written is removed and `destination` stays as it was. That
    includes KeyboardInterrupt, SIGTERM and SIGHUP; inside the block the two signals raise
    `SystemExit`, unless the program handles them itself. An OSError that is about writing becomes
    an `OutputError`; every other exception is passed on unchanged.

    Args:
        destination: the final path of the folder. Its parent must exist. A symbolic link is
            followed: the folder that it points to is written, the link stays.
        force: replace an existing bundle or empty folder; a bundle with files that are not its
            own (except plans) is not replaced.
        needed: bytes that will be written, if known: too little disk space is then an error at
            once.

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
            with private_folder(target) as root:
                try:
                    yield root / NEW
                    sync_tree(root / NEW)
                    _put_in_place(root, target, force=force)
                except OSError as error:  # here, while the size of what was written is still known
                    if failure := as_output_error(error, destination, root):
                        raise failure from error
                    raise
        except OSError as error:
            if root is None and (failure := as_output_error(error, destination, None)):
                raise failure from error
            raise


def check_destination(destination: Path, *, force: bool) -> None:
    """Raise early what `staged_folder` would raise: for long work before the first write.

    Raises:
        OutputError: `destination` may not be replaced, or its parent does not exist.
    """
    _checked_target(Path(destination), force=force)


def _checked_target(destination: Path, *, force: bool) -> Path:
    """Follow links, clean up after killed exports, refuse what may not be replaced."""
    target = Path(os.path.realpath(destination))
    parent = target.parent
    if not parent.exists():
        raise OutputError(f"cannot write {destination}: there is no folder {parent}; create it")
    if not parent.is_dir():
        raise OutputError(f"cannot write {destination}: {parent} is not a folder")
    tidy_up(target)
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
    refuse_to_lose(foreign_files(target), destination, "the bundle's")


def _put_in_place(root: Path, target: Path, *, force: bool) -> None:
    try:
        rename_exclusive(root / NEW, target)
    except FileExistsError:
        if not force:
            raise OutputError(
                f"{target} appeared while the bundle was being written and was left alone; "
                "use --force to replace it"
            ) from None
        _refuse_unless_replaceable(target, target)
        _refuse_to_lose(target, target)
        swap_in(root, target)
    sync_directory(root)
    sync_directory(target.parent)
