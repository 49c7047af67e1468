"""Open a bundle's folder after checking it.

The checks: the manifest is consistent; every file exists, is inside the folder and has its recorded
size; every file except `weights.bin` has its recorded checksum; graphs read external tensors only
from files of the bundle; the installed onnxruntime is new enough. The checksum of `weights.bin` is
checked on request, because that reads the whole file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.bundle.consistency import check_manifest
from neo_runtime.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME, Manifest
from neo_runtime.bundle.onnx_external import external_locations
from neo_runtime.errors import (
    BundleDamagedError,
    BundleError,
    BundleUnsupportedError,
    RequestError,
)
from neo_runtime.json_input import read_json_file
from neo_runtime.machine.installation import require_onnxruntime, version_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from neo_runtime.bundle.manifest import FileRecord

__all__ = ["Bundle", "check_installation", "open_bundle"]

_CHUNK = 1 << 22
_FOREIGN = re.compile(r'[\x00-\x1f\\:*?"<>|]')
"""Characters that file names must not contain, because they are special on some system or in
onnxruntime (where a tensor's location "*/_ORT_MEM_ADDR_/*" means a memory address)."""


@dataclass(frozen=True)
class Bundle:
    """A checked bundle."""

    path: Path
    """The folder, absolute and with symlinks resolved."""
    manifest: Manifest
    stamps: dict[str, tuple[int, ...]]
    """By file name: device, inode, size and modification time when it was last checked."""

    def file(self, name: str) -> Path:
        """Path of a file that `manifest.files` lists.

        If the file was replaced or modified since it was last checked, its size and checksum are
        checked again: a bundle may be exported or copied again while a model has it open.

        Args:
            name: path relative to the folder, with `/`.

        Raises:
            BundleError: the bundle has no such file, or it cannot be read.
            BundleDamagedError: the file is missing, or its contents have changed.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path} has no file {name!r}; it has {', '.join(sorted(self.manifest.files))}"
            )
        record = self.manifest.files[name]
        facts = _check_place(self.path, name)
        stamp = _stamp(facts)
        if stamp != self.stamps[name]:
            try:
                _check_size(self.path / name, facts, record)
                _check_sum(self.path, name, record)
            except BundleDamagedError as error:
                raise BundleDamagedError(
                    f"{self.path / name} has changed since the bundle was opened; if the bundle "
                    "was replaced, call neo_runtime.load again, else copy or export it again"
                ) from error
            self.stamps[name] = stamp
        return self.path / name

    def graph(self, name: str) -> Path:
        """Path of the graph `name`; the weights that it reads are checked as well, see `file`.

        Raises:
            BundleError, BundleDamagedError: see `file`.
        """
        self.file(WEIGHTS_NAME)
        return self.file(self.manifest.graphs[name].file)


def open_bundle(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
    check_runtime: bool = True,
) -> Bundle:
    """Check a folder and open it as a bundle.

    Args:
        path: a folder written by `neo-export`.
        verify: check the checksum of `weights.bin` too.
        progress: called repeatedly with the bytes checked so far and the bytes to check.
        check_runtime: require an onnxruntime that is new enough; tools that only inspect files do
            not need one.

    Raises:
        BundleError: there is no bundle at `path`, or it cannot be read.
        BundleDamagedError: a file is missing, truncated, altered or outside of the folder, or the
            manifest is inconsistent.
        BundleUnsupportedError: a newer schema, an unknown target or precision, or onnxruntime is
            too old.
        DependencyError: onnxruntime is missing or cannot be used.
        RequestError: `path` is not a path.
    """
    folder = _folder(path)
    manifest = _read_manifest(folder)
    check_manifest(manifest, f"{folder / MANIFEST_NAME}")
    stamps = {
        name: _check_place_and_size(folder, name, record) for name, record in manifest.files.items()
    }
    if _read_manifest(folder) != manifest:
        raise BundleDamagedError(f"{folder} was replaced while it was opened; open it again")
    checked = [n for n in sorted(manifest.files) if verify or n != WEIGHTS_NAME]
    done, total = 0, sum(manifest.files[name].size for name in checked)

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name in checked:
        _check_sum(folder, name, manifest.files[name], read)
    for file in sorted({graph.file for graph in manifest.graphs.values()}):
        _check_external_data(folder, file, manifest)
    if check_runtime:
        check_installation(manifest, folder)
    return Bundle(folder, manifest, stamps)


def check_installation(manifest: Manifest, folder: Path) -> str:
    """Check that the installed onnxruntime is new enough for a bundle.

    Returns:
        Its version.

    Raises:
        BundleUnsupportedError: onnxruntime is too old.
        DependencyError: onnxruntime is missing or cannot be used.
    """
    version = str(require_onnxruntime().__version__)
    if version_numbers(version) < version_numbers(manifest.minimum_onnxruntime):
        raise BundleUnsupportedError(
            f"{folder} needs onnxruntime {manifest.minimum_onnxruntime} or newer, but {version} is "
            "installed; upgrade onnxruntime, or export with --target portable"
        )
    return version


def _folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path with symlinks resolved: these and the working folder may change later."""
    try:
        return Path(os.path.realpath(path))
    except TypeError as error:
        raise RequestError(f"the bundle is {path!r}, expected the path of a folder") from error
    except ValueError as error:
        raise BundleError(f"{os.fspath(path)!r} is not a path ({error})") from error


def _read_manifest(folder: Path) -> Manifest:
    try:
        mode = folder.stat().st_mode
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise BundleError(
                f"{folder} does not exist; expected a folder written by neo-export"
            ) from error
        raise BundleError(
            f"{folder} cannot be opened: {error.strerror}; expected a folder written by neo-export"
        ) from error
    except ValueError as error:
        raise BundleError(f"{str(folder)!r} is not a path ({error})") from error
    if not stat.S_ISDIR(mode):
        raise BundleError(f"{folder} is not a folder; expected one written by neo-export")
    path = folder / MANIFEST_NAME
    try:
        text = read_json_file(path).decode()
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} has no {MANIFEST_NAME}; expected a folder written by neo-export"
        ) from error
    except UnicodeDecodeError as error:
        raise BundleDamagedError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); "
            "copy or export the bundle again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return Manifest.from_json(text, str(path))


def _check_place_and_size(folder: Path, name: str, record: FileRecord) -> tuple[int, ...]:
    """Check a file without reading it; returns its stamp, see `Bundle.stamps`."""
    facts = _check_place(folder, name)
    _check_size(folder / name, facts, record)
    return _stamp(facts)


def _stamp(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _check_size(path: Path, facts: os.stat_result, record: FileRecord) -> None:
    if facts.st_size != record.size:
        raise BundleDamagedError(
            f"{path} has {facts.st_size} bytes, expected {record.size}; "
            "copy or export the bundle again"
        )


def _check_place(folder: Path, name: str) -> os.stat_result:
    """Check that a file is inside the folder, is a regular file and can be opened for reading."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _FOREIGN.search(name):
        raise BundleDamagedError(
            f"{folder / MANIFEST_NAME} lists a file {name!r}, which is not a plain path inside the "
            "folder; do not trust this bundle, export it again"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        facts = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink loop, before Python 3.13
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise BundleDamagedError(
                f"{path} is missing; copy or export the bundle again"
            ) from error
        raise BundleError(
            f"{path} cannot be opened: {error}; copy or export the bundle again"
        ) from error
    if not real.is_relative_to(folder):
        raise BundleDamagedError(
            f"{path} is a symlink to {real}, outside of the folder; a bundle must be "
            "self-contained, so replace the symlink by the file"
        )
    if not stat.S_ISREG(facts.st_mode):
        raise BundleDamagedError(f"{path} is not a regular file; copy or export the bundle again")
    try:
        # onnxruntime, which maps the weights, would report only an error number.
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise _unreadable(path, error) from error
    return facts


def _unreadable(path: Path, error: OSError) -> BundleError:
    cure = "; give this user read permission" if isinstance(error, PermissionError) else ""
    return BundleError(f"{path} cannot be read: {error.strerror}{cure}")


def _check_sum(
    folder: Path, name: str, record: FileRecord, progress: Callable[[int], None] | None = None
) -> None:
    """Compare a file with its checksum; `progress` is called with the bytes of each chunk."""
    digest = hashlib.sha256()
    for chunk in _chunks(folder / name):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    if digest.hexdigest() != record.sha256:
        raise BundleDamagedError(
            f"{folder / name} does not match its checksum: sha256 is {digest.hexdigest()}, "
            f"expected {record.sha256}; copy or export the bundle again"
        )


def _check_external_data(folder: Path, file: str, manifest: Manifest) -> None:
    try:
        locations = external_locations(b"".join(_chunks(folder / file)))
    except ValueError as error:
        raise BundleDamagedError(
            f"{folder / file} is not an ONNX model ({error}); export the bundle again"
        ) from error
    for location in locations:
        if location not in manifest.files:
            raise BundleDamagedError(
                f"{folder / file} reads tensors from {location!r}, which is not a file of the "
                f"bundle (expected {WEIGHTS_NAME!r}); do not trust this bundle, export it again"
            )


def _chunks(path: Path) -> Iterator[bytes]:
    """The contents of a file, in chunks of at most 4 MiB."""
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _unreadable(path, error) from error
