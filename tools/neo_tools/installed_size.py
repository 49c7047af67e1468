"""How many bytes `pip install neo-onnx[cpu]` puts on the disk."""

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
    """Bytes of files that an installation of `neo-onnx[cpu]` has."""

    method: str
    bytes: int
    """Everything, compiled bytecode included."""
    bytecode_bytes: int
    """The `__pycache__` part of it, which pip writes at installation."""
    distributions: dict[str, int]
    """Bytes of each distribution, the largest first."""

    @property
    def is_within(self) -> bool:
        """Whether it is small enough."""
        return self.bytes <= SIZE_LIMIT


def closure(extra: str = "cpu", path: Sequence[str] | None = None) -> list[Distribution]:
    """`neo-onnx[extra]` and all that it requires, from the metadata of what is installed.

    Args:
        extra: of neo-onnx.
        path: folders to look in; None for `sys.path`.

    Raises:
        DependencyError: one of them is not installed.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError as error:
        raise DependencyError(
            "reading requirements needs the package packaging: pip install packaging"
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
                f"{requirement.name} is not installed, so the size of neo-onnx[{extra}] cannot be "
                "told; measure with --fresh"
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
    """Sizes of the files that the RECORDs of the closure list, as they are on the disk.

    Bytecode counts where the RECORD lists it, as pip's does. An editable installation of neo-onnx
    has its files elsewhere: those of its packages are counted instead.

    Raises:
        DependencyError: a distribution is not installed, or has no RECORD.
    """
    sizes: dict[str, int] = {}
    bytecode = 0
    for distribution in closure(path=path):
        name = distribution.metadata["Name"]
        if distribution.files is None:
            raise DependencyError(
                f"{name} has no list of its files (RECORD), so its size cannot be told; install "
                "it with pip, or measure with --fresh"
            )
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files]
        if name == "neo-onnx" and not any("neo_runtime" in file.parts for file in files):
            files += _editable_files()
        size, compiled = files_size(files)
        sizes[name], bytecode = size, bytecode + compiled
    return InstalledSize(
        method="files listed by the RECORD of neo-onnx[cpu] and of all that it requires",
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
    """Bytes of all files that exist, and of the bytecode among them."""
    size = compiled = 0
    for file in files:
        if not file.is_file():  # RECORD lists what may have been removed since
            continue
        count = file.stat().st_size
        size += count
        compiled += count if "__pycache__" in file.parts else 0
    return size, compiled
