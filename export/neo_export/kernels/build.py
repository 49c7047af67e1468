"""Compiles the decode step of a bundle and writes its kernel file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from neo_runtime.bundle.engine_record import ENGINES_FOLDER
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.step_kernels import Argument, Launch, Step, StepKernels, kernels_path
from neo_runtime.errors import BundleUnsupportedError, OutputError

from neo_export.files.replace import replace_file
from neo_export.kernels.compiler import SCRATCH_TYPES, compile_variant, compiler_name
from neo_export.kernels.graph import read_graph
from neo_export.kernels.launches import ROW_SIZES, plan_step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.step_kernels import Kernel

    from neo_export.kernels.plan import Planned, PlannedStep, Variant

__all__ = ["BuiltKernels", "build_kernels", "kernels_for", "planned_steps"]


@dataclass(frozen=True)
class BuiltKernels:
    """Kernels that have been compiled and written."""

    path: Path
    kernels: StepKernels
    size: int
    """Size of the file, in bytes."""
    seconds: float


def build_kernels(
    folder: Path,
    capability: str,
    *,
    overlap: bool,
    progress: Callable[[str, int, int], None] | None = None,
) -> BuiltKernels:
    """Compile the decode step of a bundle and write the result to the bundle's `engines/`.

    Args:
        folder: a bundle written by `neo-export --target cuda`.
        capability: compute capability of the GPUs to compile for, such as "9.0".
        overlap: use programmatic dependent launch (compute capability 9.0 or newer).
        progress: called with a phase, the kernels done and the total number of kernels.

    Raises:
        NeoError: the bundle or Triton cannot be used, or there are no kernels for the graph. An
            existing kernel file is left unchanged.
    """
    started = time.monotonic()
    bundle = open_bundle(folder, check_runtime=False)
    compiler_name()  # fails early if Triton is missing
    kernels = kernels_for(
        bundle, capability, overlap=overlap, compiler=compile_variant, progress=progress
    )
    path, text = kernels_path(folder, capability), kernels.to_json().encode()
    try:
        (folder / ENGINES_FOLDER).mkdir(exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}); free space or change its permissions"
        ) from error
    return BuiltKernels(path, kernels, len(text), round(time.monotonic() - started, 3))


def planned_steps(bundle: Bundle, *, overlap: bool) -> list[PlannedStep]:
    """The planned decode steps, one for each of `ROW_SIZES`.

    Raises:
        BundleUnsupportedError: the bundle was not exported for CUDA.
        EngineError: there are no kernels for its decode graph.
    """
    manifest = bundle.manifest
    if manifest.target != "cuda" or manifest.cache.layout != "in_place":
        raise BundleUnsupportedError(
            f"{bundle.path} was exported for {manifest.target}, expected cuda; export the model "
            "with neo-export --target cuda"
        )
    model = onnx.load(bundle.graph("decode"), load_external_data=False)
    graph = read_graph(model, manifest.model.vocab_size)
    return [plan_step(graph, manifest, rows, overlap=overlap) for rows in ROW_SIZES]


def kernels_for(
    bundle: Bundle,
    capability: str,
    *,
    overlap: bool,
    compiler: Callable[[Variant, str], Kernel],
    progress: Callable[[str, int, int], None] | None = None,
) -> StepKernels:
    """Plan the decode steps of all sizes and compile each distinct variant once.

    Args:
        bundle: exported for CUDA.
        capability: compute capability to compile for, such as "9.0".
        overlap: use programmatic dependent launch.
        compiler: compiles a variant for a compute capability.
        progress: called with a phase, the kernels done and the total number of kernels.

    Raises:
        NeoError: from `planned_steps` or `compiler`.
    """
    steps = planned_steps(bundle, overlap=overlap)
    variants = list(dict.fromkeys(one.variant for step in steps for one in step.launches))
    kernels = []
    for done, variant in enumerate(variants):
        if progress is not None:
            progress("compiling", done, len(variants))
        kernels.append(compiler(variant, capability))
    numbers = {variant: number for number, variant in enumerate(variants)}
    return StepKernels(
        bundle_digest=bundle.manifest.digest,
        compute_capability=capability,
        compiler=compiler_name(),
        memory_bytes=max(step.memory_bytes for step in steps),
        overlap=overlap,
        kernels=tuple(kernels),
        steps=tuple(
            Step(
                max_rows=step.rows,
                launches=tuple(_launch(one, numbers) for one in step.launches),
            )
            for step in steps
        ),
    )


def _launch(planned: Planned, numbers: dict[Variant, int]) -> Launch:
    unused = [Argument(kind="none") for _ in SCRATCH_TYPES]
    arguments = (*planned.arguments, *unused)
    return Launch(kernel=numbers[planned.variant], grid=planned.grid, arguments=arguments)
