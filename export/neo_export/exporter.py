"""Exports a checkpoint as a bundle: calls the steps in order, which other modules implement."""

from __future__ import annotations

import importlib.util
import math
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import onnx_ir as ir
from neo_runtime.bundle.manifest import MANIFEST_NAME, Manifest
from neo_runtime.errors import DependencyError, RequestError

from neo_export.bundle.built_graphs import build_graphs, graph_spec
from neo_export.bundle.check import check_bundle, scoring_graph
from neo_export.bundle.file_records import record_files
from neo_export.bundle.probes import probes_of
from neo_export.bundle.sidecars import write_sidecars
from neo_export.bundle.staging import staged_folder
from neo_export.bundle.weights import write_weights
from neo_export.checkpoint.folder import open_model
from neo_export.decisions.options import ExportOptions
from neo_export.decisions.options_check import check_export
from neo_export.decisions.prepared import prepare
from neo_export.reports.memory import PeakMemory
from neo_export.targets import target_named

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from neo_export.bundle.built_graphs import GraphSummary
    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.comparison.verify import Verification
    from neo_export.decisions.half_range import WideTensor
    from neo_export.decisions.prepared import Prepared
    from neo_export.quantize.migration_search import MovedPlace

    Progress = Callable[[str, int, int], None]

__all__ = ["ExportOptions", "ExportSummary", "export_bundle"]


@dataclass(frozen=True)
class ExportSummary:
    """The results of an export."""

    bundle: str
    digest: str
    target: str
    precision: str
    max_length: int
    cache_layout: str
    cache_dtype: str
    decode_weights: dict[str, int]
    """Number of matrices by how the decode graph stores them."""
    has_tokenizer: bool
    parameters: int
    weight_bytes: int
    total_bytes: int
    graphs: tuple[GraphSummary, ...]
    seconds: float
    peak_rss_bytes: int
    """Peak resident memory, memory-mapped files included."""
    peak_private_bytes: int
    """Peak private (anonymous) memory: RssAnon."""
    verification: Verification | None
    moved_places: tuple[MovedPlace, ...] = ()
    """Places whose activation outliers were moved into the weights."""
    kept_wide: tuple[WideTensor, ...] = ()
    """What stays float32 in a float16 bundle, and why."""
    largest_score: float = 0.0
    """The largest unscaled q·k of a float16 bundle, if it is near float16's limit: attention then
    uses standard operators with float32 scores."""


def export_bundle(
    model: str,
    output: Path,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write the bundle of `model` to `output`, atomically.

    Args:
        model: a Hugging Face folder, a hub id, or `modelscope:` and an id.
        output: the folder to create.
        options: the options of the export.
        progress: called with a stage's name, done and total (0 if unknown).

    Raises:
        NeoError: the model, the options or the output cannot be used; nothing is left behind.
    """
    options = options or ExportOptions()
    target = target_named(options.target)
    say = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    if options.verify:
        _check_verifiable(options.precision)
    with (
        PeakMemory() as memory,
        staged_folder(output, force=options.force) as folder,
        open_model(model, options.base, options.tokenizer) as checkpoint,
    ):
        check_export(checkpoint, target, options)
        prepared = prepare(checkpoint, target, options, say)
        say("building the graphs", 0, 0)
        models, summaries = build_graphs(prepared)
        manifest = _write(folder, checkpoint, prepared, models, say)
        say("checking what was written", 0, 0)
        check_bundle(folder, manifest)
        verification = None
        if options.verify:
            from neo_export.comparison.verify import verify_bundle

            scored = scoring_graph(models)
            weights = prepared.stored_weights(scored, folder / manifest.graphs[scored].file)
            verification = verify_bundle(
                folder, manifest, checkpoint, weights, prepared.steps, progress
            )
        say("putting it in place", 0, 0)
    sizes = {name: record.size for name, record in manifest.files.items()}
    return ExportSummary(
        bundle=str(output),
        digest=manifest.digest,
        target=manifest.target,
        precision=manifest.precision,
        max_length=manifest.max_length,
        cache_layout=manifest.cache.layout,
        cache_dtype=manifest.cache.dtype,
        decode_weights=prepared.source.decode_weights,
        has_tokenizer=manifest.has_tokenizer,
        parameters=_parameters(checkpoint),
        weight_bytes=sizes["weights.bin"],
        total_bytes=sum(sizes.values()),
        graphs=tuple(summary(sizes[f"{name}.onnx"]) for name, summary in summaries.items()),
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.rss,
        peak_private_bytes=memory.private,
        verification=verification,
        moved_places=prepared.decided.moved,
        kept_wide=prepared.decided.half.tensors,
        largest_score=prepared.decided.half.scores,
    )


def _check_verifiable(precision: str) -> None:
    """Refuse early what --verify cannot compare: the comparison itself is the last step."""
    if precision == "bf16":
        raise RequestError(
            "--verify computes on the CPU, where onnxruntime has no kernels for bfloat16; "
            "verify the same checkpoint with --fp16, and leave it out here"
        )
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise DependencyError(
                f"--verify compares with PyTorch and needs the package {name}: "
                "pip install 'neo-onnx[torch]'"
            )


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    prepared: Prepared,
    models: dict[str, ir.Model],
    say: Progress,
) -> Manifest:
    """Write every file of the bundle, its manifest last."""
    target, spec = prepared.target, prepared.spec
    weights = write_weights(models, folder, lambda done, all_: say("weights", done, all_))
    for name, graph in models.items():
        ir.save(graph, folder / f"{name}.onnx")
    has_tokenizer = write_sidecars(checkpoint, spec, prepared.cache, prepared.max_length, folder)
    manifest = Manifest(
        precision=prepared.options.precision,
        target=target.name,
        max_length=prepared.max_length,
        model=spec,
        cache=prepared.cache,
        graphs={name: graph_spec(name, graph) for name, graph in models.items()},
        probes=probes_of(models[scoring_graph(models)], spec),
        files=record_files(folder, known={"weights.bin": weights}),
        has_tokenizer=has_tokenizer,
        minimum_onnxruntime=target.minimum_onnxruntime,
        tools=_tools(),
        source=prepared.source,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _parameters(checkpoint: Checkpoint) -> int:
    """Number of parameters of the checkpoint."""
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def _tools() -> dict[str, str]:
    names = ("neo-onnx", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
