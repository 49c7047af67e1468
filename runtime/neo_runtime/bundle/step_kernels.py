"""Machine code of a bundle's decode step for one kind of GPU, and the order of its launches.

    bundle/engines/cuda-sm90.kernels        JSON, written by neo-kernels

The file knows nothing of GPT-Neo: it names places (in the weights, in the tensors of a step, in
memory of its own), and a runtime launches what it lists. Like TensorRT's plans it lies outside of
the bundle's digest and carries it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from neo_runtime.bundle.engine_record import ENGINES_FOLDER
from neo_runtime.bundle.strict_json import parse_strictly
from neo_runtime.errors import BundleDamagedError, BundleUnsupportedError, EngineError
from neo_runtime.json_input import parse_json, read_json_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Argument",
    "Extent",
    "Kernel",
    "Launch",
    "Step",
    "StepKernels",
    "find_kernels",
    "kernels_path",
    "read_kernels",
]

_SCHEMA_VERSION = 1
_SUFFIX = ".kernels"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """One of a grid's three sizes, of a batch of `rows` and caches of `length` positions.

    `times`, by `rows` times that, by the pieces of `chunk` that min(length, most) has.
    """

    times: int = 1
    per_row: bool = False
    chunk: int = 0
    """0: whatever the length."""
    most: int = 0
    """0: no limit."""

    def of(self, rows: int, length: int) -> int:
        """The size."""
        size = self.times * (rows if self.per_row else 1)
        if self.chunk:
            size *= -(-min(length, self.most or length) // self.chunk)
        return size


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What a kernel is given: an address, or a number of 32 bits."""

    kind: Literal["weights", "memory", "tensor", "rows", "length", "none"]
    """In `weights.bin`, in the kernels' own memory, of a tensor of the decode graph; the batch; the
    positions of the cache's buffers; nowhere."""
    offset: int = 0
    """Bytes, of "weights" and "memory"."""
    name: str = ""
    """Of "tensor"."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled program."""

    name: str
    """Of its entry in the image."""
    program: str
    constants: dict[str, int | float | bool | str]
    """What the program was compiled for."""
    types: tuple[str, ...]
    """Of its arguments, as the compiler calls them: "*fp16", "i32"."""
    image: str
    """A CUDA binary, base64."""
    sha256: str
    """Of the binary."""
    threads: int
    """In a block."""
    shared_bytes: int
    """Of shared memory for a block."""

    def binary(self) -> bytes:
        """The image.

        Raises:
            EngineError: it is not what was written.
        """
        try:
            data = base64.b64decode(self.image, validate=True)
        except ValueError:
            data = b""
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise EngineError(
                f"the kernel {self.name} differs from its checksum; build the kernels again with "
                "neo-kernels"
            )
        return data


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel of a step."""

    kernel: int
    """Index in `StepKernels.kernels`."""
    grid: tuple[Extent, Extent, Extent]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one decode step launches, in order."""

    max_rows: int
    """Sequences of the batch, at most."""
    launches: tuple[Launch, ...]


@dataclass(frozen=True, kw_only=True)
class StepKernels:
    """See the module."""

    bundle_digest: str
    """`Manifest.digest` of the bundle that it was built from."""
    compute_capability: str
    """Of the GPUs that it runs on, such as "9.0"."""
    compiler: str
    memory_bytes: int
    """Of the kernels' own, zeros before the first step."""
    overlap: bool
    """Whether a launch may begin before the one before it has ended (programmatic dependent
    launch): the kernels wait by themselves."""
    kernels: tuple[Kernel, ...]
    steps: tuple[Step, ...]
    """By `max_rows`."""
    schema_version: int = _SCHEMA_VERSION

    def step_for(self, rows: int) -> Step | None:
        """The step for a batch, or None where it is too large."""
        return next((step for step in self.steps if rows <= step.max_rows), None)

    def to_json(self) -> str:
        """JSON text with sorted keys and a newline at its end."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"


def kernels_path(bundle: Path, compute_capability: str) -> Path:
    """Where the kernels for GPUs of a compute capability ("9.0") lie."""
    number = compute_capability.replace(".", "")
    return bundle / ENGINES_FOLDER / f"cuda-sm{number}{_SUFFIX}"


def find_kernels(bundle: Path) -> list[Path]:
    """The files of a bundle, by name."""
    return sorted((bundle / ENGINES_FOLDER).glob(f"*{_SUFFIX}"))


def read_kernels(path: Path) -> StepKernels:
    """Read a file, strictly.

    Raises:
        EngineError: it cannot be read, or is not what `neo-kernels` writes.
        BundleUnsupportedError: it has another schema version.
    """
    again = "build the kernels again with neo-kernels"
    try:
        raw = parse_json(read_json_file(path))
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != _SCHEMA_VERSION:
            raise BundleUnsupportedError(
                f"{path} has schema version {version!r}, expected {_SCHEMA_VERSION}; {again}"
            )
        found: StepKernels = parse_strictly(StepKernels, raw, str(path))
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}); {again}") from error
    except ValueError as error:
        raise EngineError(f"{path} is not valid JSON ({error}); {again}") from error
    except BundleDamagedError as error:
        raise EngineError(f"{error} ({again})") from error
    _check_indices(found, path)
    return found


def _check_indices(found: StepKernels, path: Path) -> None:
    for step in found.steps:
        for launch in step.launches:
            if not 0 <= launch.kernel < len(found.kernels):
                raise EngineError(
                    f"{path} launches kernel {launch.kernel} of {len(found.kernels)}; build the "
                    "kernels again with neo-kernels"
                )
            if len(launch.arguments) != len(found.kernels[launch.kernel].types):
                raise EngineError(
                    f"{path} gives {len(launch.arguments)} arguments to "
                    f"{found.kernels[launch.kernel].name}, which takes "
                    f"{len(found.kernels[launch.kernel].types)}; build the kernels again with "
                    "neo-kernels"
                )
