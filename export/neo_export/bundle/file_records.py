"""Sizes and checksums of a bundle's files, some computed while they are written."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import MANIFEST_NAME, FileRecord
from neo_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["copy_file", "record_file", "record_files"]

_CHUNK = 1 << 22


def record_file(path: Path) -> FileRecord:
    """Size and sha256 of one file, read in chunks of 4 MiB."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size=size, sha256=digest.hexdigest())


def record_files(
    folder: Path, known: Mapping[str, FileRecord] | None = None
) -> dict[str, FileRecord]:
    """Records of every file in `folder` except `neo.json`, by relative path with `/`, sorted.

    Args:
        folder: the bundle being written.
        known: records made while writing; those files are not read again, only their size is
            checked.

    Raises:
        OutputError: `folder` holds a link or something else that is not a file or folder, or a
            file of `known` is missing or has another size.
    """
    known = known or {}
    records: dict[str, FileRecord] = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OutputError(f"{path} is neither a file nor a folder; a bundle holds no links")
        for name in names:
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            if key != MANIFEST_NAME:
                records[key] = known[key] if key in known else record_file(path)
    for key, record in known.items():
        size = (folder / key).stat().st_size if key in records else None
        if size != record.size:
            raise OutputError(
                f"{folder / key} has {size} bytes, {record.size} were written; "
                "was it changed meanwhile?"
            )
    return dict(sorted(records.items()))


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy contents to a new file in chunks of 4 MiB; OSError if reading or writing fails."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        while count := reader.readinto(buffer):
            digest.update(buffer[:count])
            _write_all(writer.fileno(), buffer[:count])
            size += count
    return FileRecord(size=size, sha256=digest.hexdigest())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
