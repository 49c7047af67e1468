"""Builds one plan from the prefill graph: two profiles, decode and prefill, share the weights."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from neo_runtime.bundle.engine_record import (
    ENGINES_FOLDER,
    EngineOptions,
    EngineRecord,
    engine_key,
    platform_name,
)
from neo_runtime.bundle.manifest import MANIFEST_NAME, Manifest
from neo_runtime.errors import (
    BundleDamagedError,
    BundleError,
    EngineError,
    OutputError,
    RequestError,
)

from neo_export.engine.network import add_profiles, parse_graph
from neo_export.engine.progress import kept_interrupt, progress_monitor
from neo_export.engine.ranges import resolve_options
from neo_export.engine.timing_cache import check_place, load_timings, save_timings
from neo_export.files.replace import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_export.engine.device import Device
    from neo_export.engine.flavour import Flavour
    from neo_export.engine.ranges import EngineRequest

__all__ = ["BuiltEngine", "build_engine", "read_bundle", "write_engine"]

GRAPH = "prefill"
_TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class BuiltEngine:
    """A plan that has been built and written."""

    record: EngineRecord
    path: Path
    weight_bytes: int
    """Size of the bundle's `weights.bin`, for comparison with the plan's size."""
    warnings: tuple[str, ...]
    """TensorRT's warnings, and one if the timing cache could not be saved."""


def build_engine(
    bundle: Path,
    request: EngineRequest,
    flavour: Flavour,
    device: Device,
    progress: Callable[[str, int, int], None] | None = None,
    timing_cache: Path | None = None,
) -> BuiltEngine:
    """Build a plan and write it, with its record, to the bundle's `engines/`.

    Args:
        bundle: a folder written by `neo-export --target tensorrt`.
        request: lengths, batch sizes and builder options.
        flavour: the installed TensorRT.
        device: the kind of GPU to build for.
        progress: called with a phase, the steps done and the total number of steps.
        timing_cache: file that keeps kernel timings between builds; None: `engines/timing.cache`.

    Raises:
        NeoError: the bundle, the options or the installation cannot be used, or the build
            failed. No partial plan is left behind.
    """
    say = progress or (lambda stage, done, total: None)
    manifest = read_bundle(bundle)
    options = resolve_options(request, manifest)
    if timing_cache is not None and flavour.ahead_of_time:
        raise RequestError(
            f"--timing-cache was given, but {flavour.product} times no kernels: it chooses them on "
            "the GPU at first use; omit the option"
        )
    if timing_cache is not None:
        check_place(timing_cache)
    _check_writable(bundle)
    started = time.monotonic()
    say("parsing the graph", 0, 0)
    cache = timing_cache or bundle / ENGINES_FOLDER / _TIMING_CACHE
    graph = bundle / manifest.graphs[GRAPH].file
    plan, warnings = _serialize(flavour, device, graph, options, say, cache)
    say("writing the plan", 0, 0)
    gpu = None if flavour.ahead_of_time else device.name
    capability = device.compute_capability
    key = engine_key(manifest.digest, options, flavour.name, flavour.version, capability, gpu)
    record = EngineRecord(
        file=f"{key}.plan",
        size=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        bundle_digest=manifest.digest,
        flavour=flavour.name,
        version=flavour.version,
        compute_capability=capability,
        gpu=gpu,
        platform=platform_name(),
        options=options,
        build_seconds=round(time.monotonic() - started, 3),
    )
    path = write_engine(bundle, record, plan)
    weights = manifest.files["weights.bin"].size
    return BuiltEngine(record, path, weights, (*flavour.messages(), *warnings))


def read_bundle(bundle: Path) -> Manifest:
    """Read the manifest of a bundle that plans can be built from.

    Checks that every file exists with its recorded size, and the checksum of the prefill graph. The
    weights are not hashed.

    Raises:
        BundleError: the folder is not a bundle, or the bundle is for another target.
        BundleDamagedError: a file is missing, has another size, or the graph was altered.
    """
    source = bundle / MANIFEST_NAME
    try:
        manifest = Manifest.from_json(source.read_text(encoding="utf-8"), str(source))
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{source} cannot be read ({error}); expected a folder written by neo-export"
        ) from error
    if manifest.cache.layout != "static":
        raise BundleError(
            f"{bundle} is for target {manifest.target}, whose graphs TensorRT cannot import; "
            "export the model with --target tensorrt"
        )
    for name, record in manifest.files.items():
        path = bundle / name
        if not path.is_file() or path.stat().st_size != record.size:
            raise BundleDamagedError(
                f"{path} is missing or not {record.size} bytes; copy or export the bundle again"
            )
    graph = manifest.graphs[GRAPH].file
    if hashlib.sha256((bundle / graph).read_bytes()).hexdigest() != manifest.files[graph].sha256:
        raise BundleDamagedError(
            f"{bundle / graph} does not match its checksum; copy or export the bundle again"
        )
    return manifest


def _check_writable(bundle: Path) -> None:
    """Fail before the build, which takes minutes, rather than after it."""
    folder = bundle / ENGINES_FOLDER
    try:
        with TemporaryFile(dir=folder if folder.exists() else bundle):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder} cannot be written ({error.strerror}); free space or change its permissions"
    )


def _serialize(
    flavour: Flavour,
    device: Device,
    graph: Path,
    options: EngineOptions,
    say: Callable[[str, int, int], None],
    timing_cache: Path,
) -> tuple[memoryview, list[str]]:
    """Build the network; returns the serialized plan and any warnings."""
    trt = flavour.module
    flavour.messages()  # discards messages of earlier builds
    builder = trt.Builder(flavour.logger)
    if builder is None or not builder:
        raise EngineError(_failure(flavour, "created no builder"))
    parsed = parse_graph(flavour, builder, graph)
    config = _configure(flavour, builder, device, options)
    add_profiles(builder, config, parsed.network, options)
    if not flavour.ahead_of_time:  # TensorRT for RTX times nothing
        load_timings(config, timing_cache)
    with kept_interrupt() as interrupted:
        monitor = progress_monitor(flavour, say, interrupted)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(parsed.network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if interrupted.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise EngineError(_failure(flavour, f"could not build {graph.name}"))
    warning = None if flavour.ahead_of_time else save_timings(config, timing_cache)
    return memoryview(plan), [warning] if warning else []


def _configure(flavour: Flavour, builder: Any, device: Device, options: EngineOptions) -> Any:
    trt = flavour.module
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    for wanted, flag in (
        (options.version_compatible, "VERSION_COMPATIBLE"),
        (options.stripped, "STRIP_PLAN"),
        (options.refit, "REFIT"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if user_allocation is not None:
        # Otherwise TensorRT for RTX may allocate during a step, which a CUDA graph cannot capture.
        config.set_flag(user_allocation)
    if flavour.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, device.member), 0)
    return config


def _failure(flavour: Flavour, what: str) -> str:
    words = flavour.messages() or ["it gave no reason"]
    return "\n  ".join([f"{flavour.product} {flavour.version} {what}:", *words])


def write_engine(bundle: Path, record: EngineRecord, plan: memoryview | bytes) -> Path:
    """Write the plan, then its record, each atomically; returns the plan's path.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = bundle / ENGINES_FOLDER
    path = folder / record.file
    try:
        folder.mkdir(exist_ok=True)
        replace_file(path, plan)
        replace_file(path.with_suffix(".json"), record.to_json().encode())
    except OSError as error:
        raise _unwritable(folder, error) from error
    return path
