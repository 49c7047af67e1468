"""What this CPU and this onnxruntime make of a bundle's weights, kept on disk and mapped.

Kernels of quantized products read weights in an order of their own. Left alone, each session
would write that order into private memory: once a graph, once a process. Here the first session
of a graph stores it, and all later ones map it:

    CACHE/neo-onnx/prepacked/KEY/decode/     decode.onnx  prepacked.bin ─┐ one file, by hard
    CACHE/neo-onnx/prepacked/KEY/prefill/    prefill.onnx prepacked.bin ─┘ links, where equal

The exporter orders weights alike in all graphs, so that the files are equal. KEY says what they
depend on: the bundle's digest, the CPU's kind, onnxruntime's version, this layout. A graph's folder
appears by one rename; a lock lets two processes build it once. Deleting it all is always safe.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["PrepackedCache", "cache_root", "cpu_kind"]

_LAYOUT = "1"
_WEIGHTS = "prepacked.bin"
_MINIMUM_BYTES = "1024"  # smaller tensors stay inside the graph

_log = logging.getLogger("neo_runtime")


def cache_root() -> Path:
    """Where caches live: `NEO_CACHE_DIR`, else `neo-onnx` in the user's cache folder."""
    if named := os.environ.get("NEO_CACHE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "neo-onnx"


def cpu_kind() -> str:
    """What the choice of kernels depends on: architecture, model and instruction sets."""
    lines = set()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        lines = {line.strip() for line in file if line.startswith(("model name", "flags", "Feat"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(lines)])


class PrepackedCache:
    """The prepacked graphs of one bundle."""

    def __init__(self, digest: str, onnxruntime_version: str, root: Path | None = None) -> None:
        """Name the folder; nothing is read or written yet.

        Args:
            digest: `Manifest.digest` of the bundle.
            onnxruntime_version: of the library that will read the files.
            root: in place of `cache_root()`.
        """
        kind = "\n".join([_LAYOUT, digest, onnxruntime_version, cpu_kind()])
        key = hashlib.sha256(kind.encode()).hexdigest()[:24]
        self.folder = (root or cache_root()) / "prepacked" / key

    def graph(self, name: str, build: Callable[[Path, dict[str, str]], None]) -> Path | None:
        """The stored graph `name`, built now if it is not there.

        Args:
            name: "prefill", "decode" or "score".
            build: makes a session of the bundle's own graph that writes its optimized form to the
                given path, with the given session configuration entries.

        Returns:
            The graph's path; None where the cache cannot be used (logged as a warning): then
            each session prepacks for itself.
        """
        path = self.folder / name / f"{name}.onnx"
        if path.exists():
            return path
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                if not path.exists():
                    self._build(name, build)
        except OSError as error:
            _log.warning(
                "prepacked weights cannot be kept in %s (%s): each session makes its own copy, "
                "loading is slower; set NEO_CACHE_DIR to a folder that can be written",
                self.folder,
                error.strerror or error,
            )
            return None
        return path

    @property
    def bytes_on_disk(self) -> int:
        """Size of everything that is stored for this bundle; a shared file counts once."""
        sizes = {}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size if path.is_file() else 0
        return sum(sizes.values())

    def _build(self, name: str, build: Callable[[Path, dict[str, str]], None]) -> None:
        for left_over in self.folder.glob(".partial-*"):  # a killed build: we hold the lock
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            build(
                partial / f"{name}.onnx",
                {
                    "session.save_external_prepacked_constant_initializers": "1",
                    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
                    "session.optimized_model_external_initializers_min_size_in_bytes": (
                        _MINIMUM_BYTES
                    ),
                },
            )
            self._share(partial / _WEIGHTS)
            for path in partial.iterdir():
                _sync(path)
            partial.rename(self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _share(self, weights: Path) -> None:
        """Let an equal file of another graph stand for this one: one file, mapped once."""
        for other in self.folder.glob(f"*/{_WEIGHTS}"):
            if other != weights and filecmp.cmp(other, weights, shallow=False):
                link = weights.with_suffix(".link")
                with contextlib.suppress(OSError):  # no hard links here: two files it is
                    os.link(other, link)
                    link.replace(weights)
                return


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; where the system has none, go on without."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
