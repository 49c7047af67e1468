"""Open a bundle: nothing of it is used before it has been checked.

Always: every file is there, lies inside the folder and has its recorded size; every file but
`weights.bin` has its recorded checksum; the manifest agrees with itself; the graphs read tensors
only from files of the bundle; this installation can run it. On request also the checksum of
`weights.bin`, which means reading all of it.
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
"""Characters that have a meaning on some system or in onnxruntime, and so in no bundle's names.
(Its "*/_ORT_MEM_ADDR_/*" as a tensor's location means an address in memory.)"""


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been checked."""

    path: Path
    """The folder, absolute and without links."""
    manifest: Manifest
    stamps: dict[str, tuple[int, ...]]
    """What the system says of each file, from when it was last checked."""

    def file(self, name: str) -> Path:
        """Path of the file `name` (relative to the folder, with `/`), which `manifest.files` lists.

        A file that is no longer the one that was checked is compared with its checksum again: a
        bundle may be exported or copied anew to where a model of it is in use.

        Raises:
            BundleError: the bundle has no such file, or no longer has it.
            BundleDamagedError: it has changed.
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
                    f"{self.path / name} is not what it was when the bundle was opened; if another "
                    "one was put in its place, call neo_runtime.load again"
                ) from error
            self.stamps[name] = stamp
        return self.path / name

    def graph(self, name: str) -> Path:
        """Path of the graph `name` of the manifest, which reads the weights that it was made for.

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
    """Check the folder `path` and open it as a bundle.

    Args:
        path: a folder written by `neo-export`.
        verify: compute the checksum of `weights.bin` too.
        progress: called now and then with the bytes checked so far and the bytes to check.
        check_runtime: require an onnxruntime that can run the bundle. A tool that only looks at
            files turns it off.

    Raises:
        BundleError: no bundle is there, or it cannot be read.
        BundleDamagedError: a file is missing, truncated, altered or leaves the folder, or the
            manifest contradicts itself.
        BundleUnsupportedError: a newer schema, an unknown target or precision, or an
            onnxruntime that is too old.
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
        raise BundleDamagedError(f"{folder} was replaced while it was opened; load it again")
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
    """Check that the installed onnxruntime is new enough; returns its version.

    Raises:
        BundleUnsupportedError: it is too old.
        DependencyError: it is missing or cannot be used.
    """
    version = str(require_onnxruntime().__version__)
    if version_numbers(version) < version_numbers(manifest.minimum_onnxruntime):
        raise BundleUnsupportedError(
            f"{folder} needs onnxruntime {manifest.minimum_onnxruntime} or newer, this is "
            f"{version}; upgrade onnxruntime, or export with --target portable"
        )
    return version


def _folder(path: str | os.PathLike[str]) -> Path:
    """Without links: they, and the process's working folder, may change while it is in use."""
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
        raise BundleError(f"{folder} cannot be opened: {error.strerror}") from error
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
    """Look at a file from outside; what tells it from any that takes its place."""
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
    """A file that is inside the folder and may be read, whatever it holds."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _FOREIGN.search(name):
        raise BundleDamagedError(
            f"{folder / MANIFEST_NAME} lists a file {name!r}, which is not a plain path inside the "
            "folder; do not use this bundle, export it again"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        facts = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13.
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise BundleDamagedError(
                f"{path} is missing; copy or export the bundle again"
            ) from error
        raise BundleError(f"{path} cannot be opened: {error}") from error
    if not real.is_relative_to(folder):
        raise BundleDamagedError(
            f"{path} is a link that leaves the folder (to {real}); a bundle must be "
            "self-contained: replace the link by the file"
        )
    if not stat.S_ISREG(facts.st_mode):
        raise BundleDamagedError(f"{path} is not a file; copy or export the bundle again")
    try:
        # onnxruntime, which maps the weights, would say no more than a number.
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise _unreadable(path, error) from error
    return facts


def _unreadable(path: Path, error: OSError) -> BundleError:
    cure = "; let this user read it" if isinstance(error, PermissionError) else ""
    return BundleError(f"{path} cannot be read: {error.strerror}{cure}")


def _check_sum(
    folder: Path, name: str, record: FileRecord, progress: Callable[[int], None] | None = None
) -> None:
    """Read a file; `progress` is called with the bytes of each piece."""
    digest = hashlib.sha256()
    for chunk in _chunks(folder / name):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    if digest.hexdigest() != record.sha256:
        raise BundleDamagedError(
            f"{folder / name} differs from its checksum: sha256 {digest.hexdigest()}, expected "
            f"{record.sha256}; copy or export the bundle again"
        )


def _check_external_data(folder: Path, file: str, manifest: Manifest) -> None:
    try:
        locations = external_locations(b"".join(_chunks(folder / file)))
    except ValueError as error:
        raise BundleDamagedError(
            f"{folder / file} is not an ONNX graph ({error}); export again"
        ) from error
    for location in locations:
        if location not in manifest.files:
            raise BundleDamagedError(
                f"{folder / file} reads tensors from {location!r}, which is not a file of the "
                f"bundle (expected {WEIGHTS_NAME!r}); do not use this bundle, export it again"
            )


def _chunks(path: Path) -> Iterator[bytes]:
    """The contents of a file, in pieces of at most 4 MiB."""
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _unreadable(path, error) from error
