"""TensorRT plans of a bundle: what each was built for, and whether it fits a machine.

    bundle/engines/tensorrt_rtx-1.7.1.116-sm89-3f2a9c01.plan
    bundle/engines/tensorrt_rtx-1.7.1.116-sm89-3f2a9c01.json      its record, written last

A plan is machine code for one kind of GPU and one version of one library, and no two builds give
the same bytes; so `engines/` lies outside of the bundle's digest, and a record carries it instead.
Nothing here touches a GPU or imports TensorRT: `why_unfit` is a function of facts.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from neo_runtime.bundle.strict_json import parse_strictly
from neo_runtime.errors import BundleDamagedError, BundleUnsupportedError, EngineError
from neo_runtime.json_input import parse_json, read_json_file
from neo_runtime.machine.installation import version_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = [
    "DECODE_PROFILE",
    "ENGINES_FOLDER",
    "FLAVOURS",
    "PREFILL_PROFILE",
    "PRODUCTS",
    "EngineOptions",
    "EngineRecord",
    "Flavour",
    "MachineFacts",
    "choose_engine",
    "engine_key",
    "platform_name",
    "read_records",
    "why_unfit",
]

ENGINES_FOLDER = "engines"
RECORD_SCHEMA_VERSION = 1
DECODE_PROFILE, PREFILL_PROFILE = 0, 1
"""Indices of the optimization profiles of every plan."""

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
"""The modules that build and run plans."""
PRODUCTS: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
"""As NVIDIA calls them."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a plan takes, and how it was built; lengths are new tokens of one call."""

    min_length: int = 1
    """Shortest prompt chunk."""
    opt_length: int
    """The length that kernels are chosen for."""
    max_length: int
    """Longest prompt chunk; longer prompts go through in chunks."""
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 1
    max_logit_positions: int
    """Positions of a call that may have logits: scoring goes in chunks of this many."""
    workspace_bytes: int | None = None
    """Most device memory that a kernel may use beside weights and activations; None: no limit."""
    optimization_level: int = 3
    """TensorRT's: 0 builds fastest, 5 searches longest."""
    version_compatible: bool = False
    """Newer versions of the same major version may run the plan."""
    stripped: bool = False
    """The plan holds no weights; they are put in (refit) before it runs."""
    refit: bool = False
    """Weights can be exchanged in the loaded plan."""


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What decides whether a plan runs here."""

    flavour: Flavour
    """Which module is installed: `tensorrt` or `tensorrt_rtx`."""
    version: str
    """Its `__version__`."""
    compute_capability: str
    """Of the GPU, such as "8.9"."""
    gpu: str
    """Its name, as the driver gives it."""
    platform: str
    """Operating system and processor, such as "linux-x86_64"."""


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What one plan was built from, with and for."""

    file: str
    """Name of the plan, beside the record."""
    size: int
    sha256: str
    bundle_digest: str
    """`Manifest.digest` of the bundle that it was built from."""
    flavour: Flavour
    version: str
    compute_capability: str
    gpu: str | None
    """Name of the GPU that kernels were timed on; None: built ahead of time, for any GPU of the
    compute capability."""
    platform: str
    options: EngineOptions
    build_seconds: float
    schema_version: int = RECORD_SCHEMA_VERSION

    def to_json(self) -> str:
        """JSON text with sorted keys and a newline at its end."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> EngineRecord:
        """Parse strictly.

        Raises:
            EngineError: it is not a record.
            BundleUnsupportedError: it is one of another schema version.
        """
        try:
            raw = parse_json(text)
            version = raw.get("schema_version") if isinstance(raw, dict) else None
            if version != RECORD_SCHEMA_VERSION:
                raise BundleUnsupportedError(
                    f"{source} has schema version {version!r}, expected {RECORD_SCHEMA_VERSION}; "
                    "build the plan again with neo-engine"
                )
            record: EngineRecord = parse_strictly(cls, raw, source)
        except ValueError as error:
            raise EngineError(f"{source} is not valid JSON ({error}); build again") from error
        except BundleDamagedError as error:
            raise EngineError(f"{error} (neo-engine writes such records)") from error
        return record


def platform_name() -> str:
    """Operating system and processor, as records name them: "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine()}"


def engine_key(
    digest: str,
    options: EngineOptions,
    flavour: str,
    version: str,
    capability: str,
    gpu: str | None,
) -> str:
    """Name of a plan without its suffix: the same inputs have the same, different ones another."""
    raw = json.dumps([digest, asdict(options), flavour, version, capability, gpu], sort_keys=True)
    short = hashlib.sha256(raw.encode()).hexdigest()[:8]
    return f"{flavour}-{version}-sm{capability.replace('.', '')}-{short}"


def why_unfit(record: EngineRecord, machine: MachineFacts, bundle_digest: str) -> str | None:
    """The reason why a plan must not run on a machine, or None where it may.

    Args:
        record: of the plan.
        machine: where it would run.
        bundle_digest: of the bundle that it lies in now.
    """
    if record.bundle_digest != bundle_digest:
        return (
            f"it was built from another bundle (digest {record.bundle_digest[:12]}…, this one is "
            f"{bundle_digest[:12]}…)"
        )
    if record.flavour != machine.flavour:
        return f"it is for {PRODUCTS[record.flavour]}, here is {PRODUCTS[machine.flavour]}"
    if record.platform != machine.platform:
        return f"it is for {record.platform}, this is {machine.platform}"
    if reason := _version_reason(record, machine):
        return reason
    if record.compute_capability != machine.compute_capability:
        return (
            f"it is for compute capability {record.compute_capability}, {machine.gpu} has "
            f"{machine.compute_capability}"
        )
    if record.gpu is not None and record.gpu != machine.gpu:
        return f"its kernels were chosen on {record.gpu}, this GPU is {machine.gpu}"
    if record.options.stripped:
        return "it was built without weights, and this runtime does not put them in"
    return None


def _version_reason(record: EngineRecord, machine: MachineFacts) -> str | None:
    if record.version == machine.version:
        return None
    built, here = version_numbers(record.version), version_numbers(machine.version)
    product = PRODUCTS[record.flavour]
    if not record.options.version_compatible:
        return f"it was built by {product} {record.version}, here is {machine.version}"
    if built[0] != here[0] or here < built:
        return (
            f"it was built by {product} {record.version} and runs on newer versions of "
            f"{built[0]}, here is {machine.version}"
        )
    return None


def read_records(bundle: Path) -> list[EngineRecord]:
    """Every record in the bundle's `engines/`, by name; none where there is no such folder.

    Raises:
        EngineError: a record cannot be read, or its plan is missing or has another size.
        BundleUnsupportedError: a record has another schema version.
    """
    records = []
    for path in sorted((bundle / ENGINES_FOLDER).glob("*.json")):
        try:
            record = EngineRecord.from_json(read_json_file(path).decode(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"{path} cannot be read ({error}); build the plan again") from error
        plan = path.parent / record.file
        if plan.name != record.file or plan.parent != path.parent:
            raise EngineError(f"{path} names a plan outside of its folder: {record.file!r}")
        if not plan.is_file() or plan.stat().st_size != record.size:
            raise EngineError(
                f"{plan} is missing or has not the {record.size} bytes of its record; "
                "build it again with neo-engine"
            )
        records.append(record)
    return records


def choose_engine(
    records: Iterable[EngineRecord], machine: MachineFacts, bundle_digest: str
) -> EngineRecord:
    """The plan to run: of those that fit one that takes any small request, then the largest.

    Raises:
        EngineError: none fits; each one's reason is given, and how to build one that does.
    """
    reasons, fitting = [], []
    for record in records:
        reason = why_unfit(record, machine, bundle_digest)
        if reason is None:
            fitting.append(record)
        else:
            reasons.append(f"{record.file}: {reason}")
    if not fitting:
        found = "; ".join(reasons) if reasons else "there is none"
        raise EngineError(
            f"no TensorRT plan of this bundle fits this machine ({found}); build one here with "
            "neo-engine BUNDLE"
        )
    return max(fitting, key=_preference)


def _preference(record: EngineRecord) -> tuple[bool, int, int, str]:
    options = record.options
    takes_small_ones = options.min_batch == 1 and options.min_length == 1
    return takes_small_ones, options.max_batch, options.max_length, record.file
