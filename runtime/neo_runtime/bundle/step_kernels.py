"""The decode kernels of a bundle for one compute capability: machine code and its launches.

    bundle/engines/cuda-sm90.kernels        JSON, written by neo-kernels

The file does not depend on GPT-Neo. It lists kernel launches, whose arguments are addresses in the
weights, in the tensors of a step or in scratch memory. Like TensorRT's plans, it is not part of the
bundle's digest but contains it.
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
    """One of a grid's three dimensions, as a function of batch size and cache length.

    It is `times`, multiplied by the batch size if `per_row`, and by the number of chunks of `chunk`
    positions in min(length, most) if `chunk` is not 0.
    """

    times: int = 1
    per_row: bool = False
    chunk: int = 0
    """Positions per chunk; 0: independent of the length."""
    most: int = 0
    """Most positions that count; 0: no limit."""

    def of(self, rows: int, length: int) -> int:
        """The dimension for a batch of `rows` and cache buffers of `length` positions."""
        size = self.times * (rows if self.per_row else 1)
        if self.chunk:
            size *= -(-min(length, self.most or length) // self.chunk)
        return size


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a kernel: an address or a 32-bit number."""

    kind: Literal["weights", "memory", "tensor", "rows", "length", "none"]
    """Addresses: in `weights.bin`, in the kernels' scratch memory, of a tensor of the decode graph.
    Numbers: the batch size, the positions of the cache's buffers. "none" is 0."""
    offset: int = 0
    """Bytes to add for "weights" and "memory"."""
    name: str = ""
    """The tensor's name for "tensor"."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled kernel."""

    name: str
    """Name of the kernel in the binary."""
    program: str
    """Name of the source program."""
    constants: dict[str, int | float | bool | str]
    """Compile-time constants of the program."""
    types: tuple[str, ...]
    """Types of its arguments in the compiler's notation: "*fp16", "i32"."""
    image: str
    """CUDA binary in base64."""
    sha256: str
    """Checksum (hex) of the binary."""
    threads: int
    """Threads per block."""
    shared_bytes: int
    """Dynamic shared memory per block."""

    def binary(self) -> bytes:
        """The CUDA binary.

        Raises:
            EngineError: it does not match its checksum.
        """
        try:
            data = base64.b64decode(self.image, validate=True)
        except ValueError:
            data = b""
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise EngineError(
                f"the kernel {self.name} does not match its checksum; build the kernels again with "
                "neo-kernels"
            )
        return data


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch of a step."""

    kernel: int
    """Index in `StepKernels.kernels`."""
    grid: tuple[Extent, Extent, Extent]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The launches of one decode step, in order."""

    max_rows: int
    """Largest batch size."""
    launches: tuple[Launch, ...]


@dataclass(frozen=True, kw_only=True)
class StepKernels:
    """The contents of a `.kernels` file."""

    bundle_digest: str
    """`Manifest.digest` of the bundle that it was built from."""
    compute_capability: str
    """Compute capability of the GPUs that it runs on, such as "9.0"."""
    compiler: str
    """Name and version of the compiler."""
    memory_bytes: int
    """Bytes of scratch memory, which must be zero before the first step."""
    overlap: bool
    """Whether a launch may start before the previous one has ended (programmatic dependent
    launch); the kernels then wait for it themselves."""
    kernels: tuple[Kernel, ...]
    steps: tuple[Step, ...]
    """In ascending order of `max_rows`."""
    schema_version: int = _SCHEMA_VERSION

    def step_for(self, rows: int) -> Step | None:
        """The step for a batch size; None if it is too large."""
        return next((step for step in self.steps if rows <= step.max_rows), None)

    def to_json(self) -> str:
        """JSON text with sorted keys and a final newline."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"


def kernels_path(bundle: Path, compute_capability: str) -> Path:
    """Path of a bundle's kernels for a compute capability, such as "9.0"."""
    number = compute_capability.replace(".", "")
    return bundle / ENGINES_FOLDER / f"cuda-sm{number}{_SUFFIX}"


def find_kernels(bundle: Path) -> list[Path]:
    """Paths of all `.kernels` files of a bundle, sorted by name."""
    return sorted((bundle / ENGINES_FOLDER).glob(f"*{_SUFFIX}"))


def read_kernels(path: Path) -> StepKernels:
    """Read and validate a `.kernels` file; checksums of the kernels are not checked here.

    Raises:
        EngineError: the file cannot be read, or is not valid.
        BundleUnsupportedError: the file has another schema version.
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
        raise EngineError(f"{error}; {again}") from error
    _check_indices(found, path)
    return found


def _check_indices(found: StepKernels, path: Path) -> None:
    for step in found.steps:
        for launch in step.launches:
            if not 0 <= launch.kernel < len(found.kernels):
                raise EngineError(
                    f"{path} launches kernel {launch.kernel}, but contains {len(found.kernels)}, "
                    "numbered from 0; build the kernels again with neo-kernels"
                )
            if len(launch.arguments) != len(found.kernels[launch.kernel].types):
                raise EngineError(
                    f"{path} gives {len(launch.arguments)} arguments to "
                    f"{found.kernels[launch.kernel].name}, which takes "
                    f"{len(found.kernels[launch.kernel].types)}; build the kernels again with "
                    "neo-kernels"
                )
