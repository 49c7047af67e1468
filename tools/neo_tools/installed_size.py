"""The size on disk of `pip install neo-onnx[cpu]`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["SIZE_LIMIT", "InstalledSize", "closure", "files_size", "installed_size"]

SIZE_LIMIT = 230_000_000
"""Bytes."""

_PACKAGES = ("neo_calibration", "neo_export", "neo_runtime", "neo_server", "neo_tools")


@dataclass(frozen=True, kw_only=True)
class InstalledSize:
    """Size of an installation of `neo-onnx[cpu]`."""

    method: str
    """How the size was measured, in words."""
    bytes: int
    """All files, including compiled bytecode."""
    bytecode_bytes: int
    """Of these, the bytes in `__pycache__`, which pip writes during installation."""
    distributions: dict[str, int]
    """Bytes of each distribution, largest first."""

    @property
    def is_within(self) -> bool:
        """Whether the size is within `SIZE_LIMIT`."""
        return self.bytes <= SIZE_LIMIT


def closure(extra: str = "cpu", path: Sequence[str] | None = None) -> list[Distribution]:
    """`neo-onnx[extra]` and its transitive requirements, from the metadata of installed packages.

    Args:
        extra: an extra of neo-onnx.
        path: folders to search; None: `sys.path`.

    Raises:
        DependencyError: a requirement, or the package packaging, is not installed.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError as error:
        raise DependencyError(
            "the package packaging, which reads requirements, is missing; install it with: pip "
            "install packaging"
        ) from error

    installed: dict[str, Distribution] = {}
    for found in distributions() if path is None else distributions(path=list(path)):
        installed.setdefault(canonicalize_name(found.metadata["Name"]), found)
    wanted = [Requirement(f"neo-onnx[{extra}]")]
    seen: set[tuple[str, str]] = set()
    chosen: dict[str, Distribution] = {}
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name not in installed:
            raise DependencyError(
                f"{requirement.name} is not installed, so the size of neo-onnx[{extra}] is "
                "unknown; measure with --fresh"
            )
        chosen[name] = installed[name]
        for each in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, each))
            for text in installed[name].requires or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": each}):
                    wanted.append(needed)
    return [chosen[name] for name in sorted(chosen)]


def installed_size(path: Sequence[str] | None = None) -> InstalledSize:
    """Measure the installed files of `neo-onnx[cpu]` and its transitive requirements.

    Files count if their distribution's RECORD lists them; pip's RECORDs list bytecode, too. For an
    editable installation of neo-onnx, whose files are elsewhere, those of its packages are counted.

    Args:
        path: folders to search; None: `sys.path`.

    Raises:
        DependencyError: a distribution is not installed, or has no RECORD.
    """
    sizes: dict[str, int] = {}
    bytecode = 0
    for distribution in closure(path=path):
        name = distribution.metadata["Name"]
        if distribution.files is None:
            raise DependencyError(
                f"{name} has no list of its files (RECORD), so its size is unknown; install it "
                "with pip, or measure with --fresh"
            )
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files]
        if name == "neo-onnx" and not any("neo_runtime" in file.parts for file in files):
            files += _editable_files()
        size, compiled = files_size(files)
        sizes[name], bytecode = size, bytecode + compiled
    return InstalledSize(
        method="files in the RECORDs of neo-onnx[cpu] and its requirements",
        bytes=sum(sizes.values()),
        bytecode_bytes=bytecode,
        distributions=dict(sorted(sizes.items(), key=lambda item: -item[1])),
    )


def _editable_files() -> list[Path]:
    specs = [find_spec(name) for name in _PACKAGES]
    folders = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin]
    return [
        path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts
    ]


def files_size(files: Iterable[Path]) -> tuple[int, int]:
    """Bytes of the files that exist, and of the bytecode among them."""
    size = compiled = 0
    for file in files:
        if not file.is_file():  # a file in a RECORD may have been removed
            continue
        count = file.stat().st_size
        size += count
        compiled += count if "__pycache__" in file.parts else 0
    return size, compiled
