"""What this CPU and this onnxruntime make of a bundle's weights, kept on disk and mapped.

Kernels of quantized products read weights in an order of their own. Left alone, each session
would write that order into private memory: once a graph, once a process. Here the first session
of a graph stores it, and all later ones map it:

    CACHE/prepacked/KEY/decode/     files.json decode.onnx  prepacked.bin ─┐ one file, by hard
    CACHE/prepacked/KEY/prefill/    files.json prefill.onnx prepacked.bin ─┘ links, where equal

The exporter orders weights alike in all graphs, so that the files are equal. KEY says what they
depend on: the bundle's digest, the CPU's kind, onnxruntime's version, this layout. A graph's folder
appears by one rename; a lock lets two processes build it once. `files.json` records what was
written: a folder that no longer agrees with it is built again. Deleting it all is always safe.
That record is no seal: who owns a folder decides what is in it, so not everybody's are used.
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
"""Beside each stored graph: its tensors, and what onnxruntime made of them."""

_LAYOUT = "2"
_RECORD = "files.json"
_MINIMUM_BYTES = "1024"  # smaller tensors stay inside the graph

_log = logging.getLogger("neo_runtime")


def cache_root() -> Path:
    """Where caches live: `NEO_CACHE_DIR`, else `neo-onnx` in the user's cache folder.

    Raises:
        OSError: this user has no home.
    """
    if named := os.environ.get("NEO_CACHE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "neo-onnx"
    except RuntimeError as error:  # a container's user may be nobody in particular
        raise OSError("this user has no home folder") from error


def cpu_kind() -> str:
    """What the choice of kernels depends on: architecture, model and instruction sets."""
    lines = set()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        lines = {line.strip() for line in file if line.startswith(("model name", "flags", "Feat"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(lines)])


def warn_of_copies(where: str, reason: str) -> None:
    """Say in the log what it means that there is no place for prepacked weights."""
    _log.warning(
        "prepacked weights cannot be kept %s (%s): each session makes its own copy, loading is "
        "slower; set NEO_CACHE_DIR to a folder with room that can be written",
        where,
        reason,
    )


class PrepackedCache:
    """The prepacked graphs of one bundle."""

    def __init__(
        self,
        digest: str,
        onnxruntime_version: str,
        root: Path | None = None,
        *,
        verify: bool = False,
    ) -> None:
        """Name the folder; nothing is read or written yet.

        Args:
            digest: `Manifest.digest` of the bundle.
            onnxruntime_version: of the library that will read the files.
            root: in place of `cache_root()`.
            verify: compare stored weights with their checksum, not only with their size.

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
        """The stored graph `name`, built now if it is not there.

        Args:
            name: "prefill", "decode" or "score".
            build: makes a session of the bundle's own graph that writes its optimized form to the
                given path, with the given session configuration entries.
            anew: what is there cannot be loaded.

        Returns:
            The graph's path; None where the cache cannot be used (logged as a warning): then
            each session prepacks for itself.

        Raises:
            BundleDamagedError: so `build` said; nothing was stored.
        """
        folder = self.folder / name
        path = folder / f"{name}.onnx"
        try:
            self._refuse_strangers(name)
            if not anew and _is_whole(folder, verify=self._verify):
                return path
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_strangers(name)  # somebody may have been quicker
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
            # So onnxruntime reports a full disk. If it is the bundle's own graph that cannot be
            # loaded, the session without a cache says so next.
            self._warn("onnxruntime could not write them, is the disk full?")
            _log.debug("%s", error)
            return None
        return path

    def _refuse_strangers(self, name: str) -> None:
        """Raises PermissionError for a folder below the root that another user has made.

        Where the root is shared (below /tmp), they could do so before us, and then give us other
        weights, or a link in place of the lock, which is opened to write. Who owns the root is
        trusted where not everybody could have made it: of a shared file system all files may have
        one owner.
        """
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
        """Size of everything that is stored for this bundle; a shared file counts once."""
        sizes = {}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size if path.is_file() else 0
        return sum(sizes.values())

    def _warn(self, reason: str) -> None:
        """Once a model: each of its sessions meets the same obstacle."""
        if self._has_warned:
            return
        self._has_warned = True
        warn_of_copies(f"in {self.folder}", reason)

    def _discard(self, name: str) -> None:
        """Remove a damaged folder; sessions that have mapped its files keep them."""
        folder = self.folder / name
        if folder.exists():
            _log.warning("%s is damaged: prepacked weights are built again", folder)
            shutil.rmtree(folder)

    def _build(self, name: str, build: Callable[[Path, dict[str, str]], None]) -> None:
        for left_over in self.folder.glob(".partial-*"):  # a killed build: we hold the lock
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
        """Let an equal file of another graph stand for this one: one file, mapped once.

        Returns:
            That graph's folder, or None.
        """
        for other in self.folder.glob(f"*/{WEIGHTS_FILE}"):
            if other != weights and filecmp.cmp(other, weights, shallow=False):
                link = weights.with_suffix(".link")
                with contextlib.suppress(OSError):  # no hard links here: two files it is
                    os.link(other, link)
                    link.replace(weights)
                return other.parent
        return None


def _record(folder: Path, equal: Path | None) -> None:
    """Write down what lies in a graph's folder; `equal` is another one with the same weights."""
    files = {path.name: _describe(path, verify=False) for path in sorted(folder.iterdir())}
    known = _recorded(equal) if equal is not None else {}
    if known.get(WEIGHTS_FILE, {}).keys() == {"size", "sha256"}:  # reading them takes seconds
        files[WEIGHTS_FILE] = known[WEIGHTS_FILE]
    elif WEIGHTS_FILE in files:  # tensors of a tiny model stay inside the graph
        files[WEIGHTS_FILE] = _describe(folder / WEIGHTS_FILE, verify=True)
    (folder / _RECORD).write_text(json.dumps(files), encoding="utf-8")


def _is_whole(folder: Path, *, verify: bool = False) -> bool:
    """Whether a graph's folder holds what was written into it."""
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
    """What `_record` wrote; {} where that is not to be read."""
    try:
        found = parse_json((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_record = isinstance(found, dict) and all(isinstance(v, dict) for v in found.values())
    return found if is_record else {}


def _describe(path: Path, *, verify: bool) -> dict[str, Any]:
    """Size and checksum, of the weights only to verify: that reads what is mapped otherwise."""
    found: dict[str, Any] = {"size": path.stat().st_size}
    if verify or path.name != WEIGHTS_FILE:
        with path.open("rb") as file:
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; where the system has none, go on without."""
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
            # Not by closing alone: a child that was forked off meanwhile may have it open as well.
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
