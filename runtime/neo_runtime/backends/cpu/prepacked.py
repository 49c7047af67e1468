"""A disk cache of prepacked weights, memory-mapped by all sessions of a bundle.

Kernels for quantized matrix products read weights in an order of their own ("prepacked"), which
depends on the CPU. By default each session converts the weights into private memory: once per graph
and process. Here the first session of a graph stores the result, and all later ones map it:

    CACHE/prepacked/KEY/decode/     files.json decode.onnx  prepacked.bin ─┐ one file by hard
    CACHE/prepacked/KEY/prefill/    files.json prefill.onnx prepacked.bin ─┘ links, if equal

The exporter orders the weights the same way in all graphs, so that the files are equal. KEY is a
hash of what they depend on: the bundle's digest, the kind of CPU, onnxruntime's version and this
layout. A graph's folder appears by an atomic rename, and a lock ensures that only one process
builds it. `files.json` records sizes and checksums; a folder that does not match it is built again.
Deleting the cache is always safe.

The record detects damage, not manipulation: whoever owns a folder controls its contents. So folders
of other users are refused, see `PrepackedCache`.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from neo_runtime.errors import BundleDamagedError, BundleError
from neo_runtime.forks import in_every_child
from neo_runtime.json_input import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["WEIGHTS_FILE", "PrepackedCache", "cache_root", "cpu_kind", "warn_of_copies"]

WEIGHTS_FILE = "prepacked.bin"
"""Name of the file beside each stored graph that holds its tensors, prepacked ones included."""

_LAYOUT = "2"
_RECORD = "files.json"
_MINIMUM_BYTES = "1024"  # smaller tensors are stored in the graph's own file

_log = logging.getLogger("neo_runtime")


def cache_root() -> Path:
    """The folder for caches: `NEO_CACHE_DIR`, else `neo-onnx` in the user's cache folder.

    The latter is `XDG_CACHE_HOME`, else `~/.cache`.

    Raises:
        OSError: this user has no home folder.
    """
    if named := os.environ.get("NEO_CACHE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "neo-onnx"
    except RuntimeError as error:  # in a container, a user id may have no account
        raise OSError("this user has no home folder") from error


def cpu_kind() -> str:
    """What the choice of kernels depends on: architecture, CPU model and instruction sets."""
    lines = set()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        lines = {line.strip() for line in file if line.startswith(("model name", "flags", "Feat"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(lines)])


def warn_of_copies(where: str, reason: str) -> None:
    """Log a warning that prepacked weights cannot be cached, and what that costs.

    Args:
        where: place, such as "on disk".
        reason: why not.
    """
    _log.warning(
        "prepacked weights cannot be kept %s (%s): each session makes its own copy, and loading is "
        "slower; set NEO_CACHE_DIR to a writable folder with enough free space",
        where,
        reason,
    )


class PrepackedCache:
    """The stored graphs of one bundle.

    Folders of other users are refused. Under a shared root (such as /tmp) another user could create
    them first, to supply other weights, or a symlink in place of the lock file, which is opened for
    writing. The root's owner is trusted unless the folder around it is world-writable: on some
    shared file systems all files have the same owner.
    """

    def __init__(
        self,
        digest: str,
        onnxruntime_version: str,
        root: Path | None = None,
        *,
        verify: bool = False,
    ) -> None:
        """Compute the folder's name; nothing is read or written yet.

        Args:
            digest: `Manifest.digest` of the bundle.
            onnxruntime_version: version of the library that will read the files.
            root: folder for caches; None for `cache_root()`.
            verify: compare stored weights with their checksum, not only their size.

        Raises:
            OSError: see `cache_root`.
        """
        kind = "\n".join([_LAYOUT, digest, onnxruntime_version, cpu_kind()])
        key = hashlib.sha256(kind.encode()).hexdigest()[:24]
        self.folder = (root or cache_root()) / "prepacked" / key
        self._verify = verify
        self._has_warned = False

    def graph(
        self, name: str, build: Callable[[Path, dict[str, str]], None], *, anew: bool = False
    ) -> Path | None:
        """The stored graph `name`; built first if it is missing or damaged.

        Args:
            name: "prefill", "decode" or "score".
            build: creates a session of the bundle's own graph that writes its optimized form to the
                given path, with the given session configuration entries.
            anew: build it even if it is there, because it cannot be loaded.

        Returns:
            The graph's path; None if the cache cannot be used, which is logged as a warning. The
            session then has to prepack for itself.

        Raises:
            BundleDamagedError: raised by `build`; nothing was stored.
        """
        folder = self.folder / name
        path = folder / f"{name}.onnx"
        try:
            self._refuse_strangers(name)
            if not anew and _is_whole(folder, verify=self._verify):
                return path
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_strangers(name)  # again: another user may have created it meanwhile
            with _locked(self.folder / "lock"):
                if anew or not _is_whole(folder, verify=self._verify):
                    self._discard(name)
                    self._build(name, build)
        except OSError as error:
            self._warn(error.strerror or str(error))
            return None
        except BundleDamagedError:
            raise
        except BundleError as error:
            # onnxruntime reports a full disk like this. If the bundle's own graph cannot be loaded,
            # the session without a cache, made next, raises.
            self._warn("onnxruntime could not write them; is the disk full?")
            _log.debug("%s", error)
            return None
        return path

    def _refuse_strangers(self, name: str) -> None:
        """Raise PermissionError if another user owns a folder of the cache; see the class."""
        ours = {0, os.geteuid()} if hasattr(os, "geteuid") else {0}
        root = self.folder.parent.parent.resolve()
        with contextlib.suppress(FileNotFoundError):
            if not root.parent.stat().st_mode & stat.S_IWOTH:
                ours.add(root.stat().st_uid)
        for folder in (self.folder.parent, self.folder, self.folder / name):
            with contextlib.suppress(FileNotFoundError):
                if (owner := folder.lstat().st_uid) not in ours:
                    raise PermissionError(errno.EPERM, f"{folder} belongs to user {owner}")

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all files stored for this bundle; a hard-linked file counts once."""
        sizes = {}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size if path.is_file() else 0
        return sum(sizes.values())

    def _warn(self, reason: str) -> None:
        """Warn once per model, since all its sessions meet the same obstacle."""
        if self._has_warned:
            return
        self._has_warned = True
        warn_of_copies(f"in {self.folder}", reason)

    def _discard(self, name: str) -> None:
        """Remove a damaged folder. Sessions that have mapped its files are not affected."""
        folder = self.folder / name
        if folder.exists():
            _log.warning("%s is damaged; building the prepacked weights again", folder)
            shutil.rmtree(folder)

    def _build(self, name: str, build: Callable[[Path, dict[str, str]], None]) -> None:
        # The lock is held, so these are left over from builds that were killed.
        for left_over in self.folder.glob(".partial-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            build(
                partial / f"{name}.onnx",
                {
                    "session.save_external_prepacked_constant_initializers": "1",
                    "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
                    "session.optimized_model_external_initializers_min_size_in_bytes": (
                        _MINIMUM_BYTES
                    ),
                },
            )
            _record(partial, self._share(partial / WEIGHTS_FILE))
            for path in partial.iterdir():
                _sync(path)
            partial.rename(self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _share(self, weights: Path) -> Path | None:
        """Replace a weight file by a hard link to an equal one of another graph, if there is one.

        Returns:
            The folder of the graph with equal weights, or None.
        """
        for other in self.folder.glob(f"*/{WEIGHTS_FILE}"):
            if other != weights and filecmp.cmp(other, weights, shallow=False):
                link = weights.with_suffix(".link")
                with contextlib.suppress(OSError):  # without hard links, keep two files
                    os.link(other, link)
                    link.replace(weights)
                return other.parent
        return None


def _record(folder: Path, equal: Path | None) -> None:
    """Write a graph folder's record; `equal` is another graph's folder with the same weights."""
    files = {path.name: _describe(path, verify=False) for path in sorted(folder.iterdir())}
    known = _recorded(equal) if equal is not None else {}
    if known.get(WEIGHTS_FILE, {}).keys() == {"size", "sha256"}:  # saves seconds of hashing
        files[WEIGHTS_FILE] = known[WEIGHTS_FILE]
    elif WEIGHTS_FILE in files:  # a tiny model's tensors are all in the graph's own file
        files[WEIGHTS_FILE] = _describe(folder / WEIGHTS_FILE, verify=True)
    (folder / _RECORD).write_text(json.dumps(files), encoding="utf-8")


def _is_whole(folder: Path, *, verify: bool = False) -> bool:
    """Whether a graph's folder matches its record; the weights' checksum only with `verify`."""
    files = _recorded(folder)
    if not verify and WEIGHTS_FILE in files:
        files[WEIGHTS_FILE].pop("sha256", None)
    try:
        return bool(
            files == {name: _describe(folder / name, verify=verify) for name in files} != {}
        )
    except OSError:
        return False


def _recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The record that `_record` wrote; {} if it is missing or cannot be read."""
    try:
        found = parse_json((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_record = isinstance(found, dict) and all(isinstance(v, dict) for v in found.values())
    return found if is_record else {}


def _describe(path: Path, *, verify: bool) -> dict[str, Any]:
    """Size and checksum of a file; for the weights only the size, unless `verify`."""
    found: dict[str, Any] = {"size": path.stat().st_size}
    if verify or path.name != WEIGHTS_FILE:
        with path.open("rb") as file:
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; on systems without file locks, do nothing."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield
            return
        _held_locks.add(file)
        try:
            yield
        finally:
            _held_locks.discard(file)
            # Closing is not enough: a child forked meanwhile may hold the file open as well.
            fcntl.flock(file, fcntl.LOCK_UN)


_held_locks: set[IO[str]] = set()


def _let_go_of_locks() -> None:
    for file in list(_held_locks):
        file.close()
    _held_locks.clear()


in_every_child(_let_go_of_locks)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
