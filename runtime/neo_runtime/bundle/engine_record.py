"""Records of a bundle's TensorRT plans: what each was built for, and whether it fits a machine.

    bundle/engines/tensorrt_rtx-1.7.1.116-sm89-3f2a9c01.plan
    bundle/engines/tensorrt_rtx-1.7.1.116-sm89-3f2a9c01.json      its record, written last

A plan is machine code for one kind of GPU and one version of one library, and builds are not
reproducible. So `engines/` is not part of the bundle's digest; instead each record contains the
digest of the bundle that its plan was built from. This module does not access a GPU or TensorRT.
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
"""Indices of the two optimization profiles in each plan."""

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
"""The Python modules that build and run plans."""
PRODUCTS: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
"""NVIDIA's product names."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The shapes that a plan accepts, and how it was built. Lengths are new tokens per call."""

    min_length: int = 1
    """Shortest prompt chunk."""
    opt_length: int
    """Chunk length that kernels are optimized for."""
    max_length: int
    """Longest prompt chunk; longer prompts are split into chunks."""
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 1
    max_logit_positions: int
    """Most positions per call with logits; longer texts are scored in chunks of this length."""
    workspace_bytes: int | None = None
    """Most device memory per kernel besides weights and activations; None: no limit."""
    optimization_level: int = 3
    """TensorRT's level, from 0 (fastest build) to 5 (longest search)."""
    version_compatible: bool = False
    """Whether newer versions with the same major version can run the plan."""
    stripped: bool = False
    """Whether the plan has no weights, so that it must be refitted before it runs."""
    refit: bool = False
    """Whether the weights of the loaded plan can be replaced."""


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """The properties of a machine that decide whether a plan runs on it."""

    flavour: Flavour
    """The installed module, `tensorrt` or `tensorrt_rtx`."""
    version: str
    """The module's `__version__`."""
    compute_capability: str
    """The GPU's, such as "8.9"."""
    gpu: str
    """The GPU's name, as the driver reports it."""
    platform: str
    """Operating system and processor, such as "linux-x86_64"."""


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What one plan was built from, by and for."""

    file: str
    """Name of the plan's file, in the record's folder."""
    size: int
    """Bytes of the plan's file."""
    sha256: str
    """Checksum (hex) of the plan's file."""
    bundle_digest: str
    """`Manifest.digest` of the bundle that it was built from."""
    flavour: Flavour
    version: str
    compute_capability: str
    gpu: str | None
    """Name of the GPU that kernels were timed on; None: built without timing, for any GPU of the
    compute capability."""
    platform: str
    options: EngineOptions
    build_seconds: float
    schema_version: int = RECORD_SCHEMA_VERSION

    def to_json(self) -> str:
        """JSON text with sorted keys and a final newline."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> EngineRecord:
        """Parse a record strictly.

        Args:
            text: JSON text.
            source: name of its file, for errors.

        Raises:
            EngineError: the text is not a valid record.
            BundleUnsupportedError: the record has another schema version.
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
            raise EngineError(
                f"{source} is not valid JSON ({error}); build the plan again with neo-engine"
            ) from error
        except BundleDamagedError as error:
            raise EngineError(f"{error}; build the plan again with neo-engine") from error
        return record


def platform_name() -> str:
    """This machine's operating system and processor, such as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine()}"


def engine_key(
    digest: str,
    options: EngineOptions,
    flavour: str,
    version: str,
    capability: str,
    gpu: str | None,
) -> str:
    """File name of a plan without its suffix; different for different arguments.

    Args:
        digest: `Manifest.digest` of the bundle.
        options: how the plan is built.
        flavour: "tensorrt" or "tensorrt_rtx".
        version: version of that module.
        capability: compute capability, such as "8.9".
        gpu: name of the GPU; None for a plan built without timing.
    """
    raw = json.dumps([digest, asdict(options), flavour, version, capability, gpu], sort_keys=True)
    short = hashlib.sha256(raw.encode()).hexdigest()[:8]
    return f"{flavour}-{version}-sm{capability.replace('.', '')}-{short}"


def why_unfit(record: EngineRecord, machine: MachineFacts, bundle_digest: str) -> str | None:
    """Why a plan cannot run on a machine; None if it can.

    Args:
        record: the plan's record.
        machine: the machine.
        bundle_digest: digest of the bundle that contains the plan now.
    """
    if record.bundle_digest != bundle_digest:
        return (
            f"it was built from another bundle (digest {record.bundle_digest[:12]}…, this one has "
            f"{bundle_digest[:12]}…)"
        )
    if record.flavour != machine.flavour:
        return f"it is for {PRODUCTS[record.flavour]}, this is {PRODUCTS[machine.flavour]}"
    if record.platform != machine.platform:
        return f"it is for {record.platform}, this is {machine.platform}"
    if reason := _version_reason(record, machine):
        return reason
    if record.compute_capability != machine.compute_capability:
        return (
            f"it is for compute capability {record.compute_capability}, but {machine.gpu} has "
            f"{machine.compute_capability}"
        )
    if record.gpu is not None and record.gpu != machine.gpu:
        return f"its kernels were chosen on {record.gpu}, this GPU is {machine.gpu}"
    if record.options.stripped:
        return "it was built without weights, and this runtime does not refit plans"
    return None


def _version_reason(record: EngineRecord, machine: MachineFacts) -> str | None:
    if record.version == machine.version:
        return None
    built, here = version_numbers(record.version), version_numbers(machine.version)
    product = PRODUCTS[record.flavour]
    if not record.options.version_compatible:
        return f"it was built by {product} {record.version}, this is {machine.version}"
    if built[0] != here[0] or here < built:
        return (
            f"it was built by {product} {record.version} and runs only on that or newer "
            f"{built[0]}.x versions, this is {machine.version}"
        )
    return None


def read_records(bundle: Path) -> list[EngineRecord]:
    """All records in a bundle's `engines/`, sorted by file name; [] if there is no such folder.

    Raises:
        EngineError: a record cannot be read, or its plan is missing or has another size.
        BundleUnsupportedError: a record has another schema version.
    """
    records = []
    for path in sorted((bundle / ENGINES_FOLDER).glob("*.json")):
        try:
            record = EngineRecord.from_json(read_json_file(path).decode(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(
                f"{path} cannot be read ({error}); build the plan again with neo-engine"
            ) from error
        plan = path.parent / record.file
        if plan.name != record.file or plan.parent != path.parent:
            raise EngineError(
                f"{path} names a plan outside of its folder, {record.file!r}; delete the record, "
                "and build the plan again with neo-engine"
            )
        if not plan.is_file() or plan.stat().st_size != record.size:
            raise EngineError(
                f"{plan} is missing, or its size is not {record.size} bytes as its record says; "
                "build it again with neo-engine"
            )
        records.append(record)
    return records


def choose_engine(
    records: Iterable[EngineRecord], machine: MachineFacts, bundle_digest: str
) -> EngineRecord:
    """Choose the plan to run.

    Of the plans that fit, those that accept single sequences and single tokens come first, then the
    largest batch and chunk length.

    Raises:
        EngineError: no plan fits; the message gives the reason for each.
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
