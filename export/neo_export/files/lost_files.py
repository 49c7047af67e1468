"""Refuses to replace a folder if files that do not belong to it would be lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["files_inside", "refuse_to_lose"]

_SHOWN = 5


def files_inside(folder: Path) -> Iterator[str]:
    """Relative paths of all files and links inside, with "/"; links are not followed.

    Raises:
        OSError: a folder cannot be read.
    """
    for parent, folders, names in os.walk(folder, onerror=_raise):
        at = Path(parent)
        links = [name for name in folders if (at / name).is_symlink()]
        for name in (*names, *links):
            yield (at / name).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a file that is gone cannot be lost
        raise error


def refuse_to_lose(names: Sequence[str], destination: Path, whose: str) -> None:
    """Refuse to replace a folder with foreign files, such as the user's notes.

    Args:
        names: names of the files that would be lost.
        destination: the folder, as the user named it.
        whose: the owner of the folder's other files, as in "files that are not …".

    Raises:
        OutputError: `names` is not empty.
    """
    if not names:
        return
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise OutputError(
        f"{destination} holds files that are not {whose} and would be lost: {shown}{more}; "
        "move them out of it, or choose another path"
    )
