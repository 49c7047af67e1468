"""A checkpoint becomes a bundle: the order of things, each done elsewhere."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import onnx_ir as ir
from neo_runtime.errors import RequestError
from neo_runtime.manifest import MANIFEST_NAME, GraphSpec, Manifest, TensorSpec, is_quantized
from onnx_ir.passes.common import RemoveUnusedNodesPass

from neo_export.calibrated import calibrated, open_statistics, uses_gptq
from neo_export.check import check_bundle, scoring_graph
from neo_export.checkpoint import expected_shapes, open_checkpoint
from neo_export.graphs import build_graph, drop_builder_notes
from neo_export.hub import resolve_model
from neo_export.memory import PeakMemory
from neo_export.passes.quantize_cache import quantize_cache_steps
from neo_export.probes import probes_of
from neo_export.quantize.kv_cache import calibrated_steps
from neo_export.quantize.read_back import ReadBack
from neo_export.quantize.remembered import Remembered
from neo_export.quantize.stored import StoredWeights
from neo_export.sidecars import write_sidecars
from neo_export.staging import record_files, staged_folder
from neo_export.targets import Quantization, passes_for, target_named
from neo_export.weights import (
    ReadParameter,
    bind_parameters,
    sort_initializers,
    write_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from neo_runtime.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_export.checkpoint import Checkpoint
    from neo_export.half_range import WideTensor
    from neo_export.passes import Pass
    from neo_export.quantize.migration_search import MovedPlace
    from neo_export.targets import Target
    from neo_export.verify import Verification

__all__ = ["ExportOptions", "ExportSummary", "GraphSummary", "PassSummary", "export_bundle"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint."""

    target: str = "cpu"
    precision: str = "fp32"
    quantization: Quantization = field(default_factory=Quantization)
    max_length: int | None = None
    """Positions a sequence may have; None for all that the checkpoint has."""
    kv_cache: str = "float"
    """How keys and values are kept: one of `CACHE_FORMATS`."""
    calibration: Path | None = None
    """Statistics of the checkpoint, which `neo-calibrate` wrote."""
    remembered: Path | None = None
    """A folder that keeps matrices quantized with these statistics for the next export."""
    verify: bool = False
    """Compare numbers with PyTorch before the bundle is put in place."""
    force: bool = False
    """Replace a bundle that is there."""


@dataclass(frozen=True)
class PassSummary:
    """One pass on one graph."""

    name: str
    fired: int
    nodes: int
    """Operators of the graph after it."""


@dataclass(frozen=True)
class GraphSummary:
    """One graph, from the portable form to what was written."""

    name: str
    bytes: int
    nodes_before: int
    passes: tuple[PassSummary, ...]
    operators: dict[str, int]


@dataclass(frozen=True)
class ExportSummary:
    """What an export did."""

    bundle: str
    digest: str
    target: str
    precision: str
    max_length: int
    cache_layout: str
    parameters: int
    weight_bytes: int
    total_bytes: int
    graphs: tuple[GraphSummary, ...]
    seconds: float
    peak_rss_bytes: int
    """Largest resident memory, mapped files included."""
    peak_private_bytes: int
    """Largest private (anonymous) memory: RssAnon."""
    verification: Verification | None
    moved_places: tuple[MovedPlace, ...] = ()
    """Where activation outliers were moved into the weights."""
    kept_wide: tuple[WideTensor, ...] = ()
    """What stays float32 in a float16 bundle, and why."""
    largest_score: float = 0.0
    """The largest unscaled q·k of a float16 bundle, where it is near the end of float16: attention
    is in standard operators then, with float32 scores."""


def export_bundle(
    model: str,
    output: Path,
    options: ExportOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportSummary:
    """Write the bundle of `model` to `output`, whole or not at all.

    Args:
        model: a Hugging Face folder, a hub id, or `modelscope:` and an id.
        output: the folder to create.
        options: what to make of it.
        progress: called with a stage's name, done and total (0 where unknown).

    Raises:
        NeoError: the model, the options or the output cannot be used; nothing is left behind.
    """
    options = options or ExportOptions()
    target = target_named(options.target)
    say = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    with (
        PeakMemory() as memory,
        staged_folder(output, force=options.force) as folder,
        open_checkpoint(resolve_model(model)) as checkpoint,
    ):
        if options.verify and options.precision == "bf16":
            raise RequestError(
                "--verify computes on the CPU, where onnxruntime has no kernels for bfloat16; "
                "verify the same checkpoint with --fp16, and leave it out here"
            )
        spec = checkpoint.spec
        max_length = _max_length(options.max_length, spec)
        if options.quantization.plan is not None:
            options.quantization.plan.check_model(expected_shapes(spec), "the plan")

        def read(name: str) -> NDArray[np.float32]:
            tensor = checkpoint.tensors[name]
            tensor.check_finite()  # here, where the checkpoint's own name is known
            return tensor.read()

        plan = target.plan_for(options.quantization, "decode", options.precision, spec)
        statistics = open_statistics(
            options.calibration, checkpoint, say, second_moments=uses_gptq(target, plan, spec)
        )
        decided = calibrated(statistics, checkpoint, read, target, options.precision, plan, say)
        target = decided.target
        cache, steps = target.cache(spec, options.precision), None
        if options.kv_cache == "int8":
            steps = calibrated_steps(statistics, cache, spec)
            cache = replace(cache, dtype="int8")
        migrated = decided.migration.reading(read)
        quantizer = decided.quantizer
        if quantizer is not None and options.remembered is not None:
            quantizer = Remembered(quantizer, options.remembered)
        passes = {
            name: decided.passes
            + passes_for(
                target,
                options.precision,
                name,
                spec,
                options.quantization,
                quantizer,
                max_length,
                decided.largest_input,
            )
            for name, _ in target.graphs
        }
        if steps is not None:
            for name in passes:
                passes[name] += (quantize_cache_steps(steps, single=name == "decode"),)
        say("building the graphs", 0, 0)
        models, summaries = _build(spec, target, passes, migrated)
        weights = write_weights(models, folder, lambda done, all_: say("weights", done, all_))
        for name, graph in models.items():
            ir.save(graph, folder / f"{name}.onnx")
        has_tokenizer = write_sidecars(checkpoint, spec, target.name, max_length, folder)
        manifest = Manifest(
            precision=options.precision,
            target=target.name,
            max_length=max_length,
            model=spec,
            cache=cache,
            graphs={name: _graph_spec(name, graph) for name, graph in models.items()},
            probes=probes_of(models[scoring_graph(models)], spec),
            files=record_files(folder, known={"weights.bin": weights.record}),
            has_tokenizer=has_tokenizer,
            minimum_onnxruntime=target.minimum_onnxruntime,
            tools=_tools(),
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        say("checking what was written", 0, 0)
        check_bundle(folder, manifest)
        verification = None
        if options.verify:
            from neo_export.verify import verify_bundle

            scored = scoring_graph(models)
            plan = target.plan_for(options.quantization, scored, options.precision, spec)
            written = folder / manifest.graphs[scored].file
            stored = StoredWeights(
                migrated,
                plan,
                ReadBack(written) if decided.quantizer else target.quantizer,
                half_positions=is_quantized(options.precision),
            )
            weights_read_back = decided.migration.restoring(stored)
            verification = verify_bundle(
                folder, manifest, checkpoint, weights_read_back, steps, progress
            )
        sizes = {name: record.size for name, record in manifest.files.items()}
        say("putting it in place", 0, 0)
    return ExportSummary(
        bundle=str(output),
        digest=manifest.digest,
        target=target.name,
        precision=options.precision,
        max_length=max_length,
        cache_layout=manifest.cache.layout,
        parameters=_parameters(checkpoint),
        weight_bytes=sizes["weights.bin"],
        total_bytes=sum(sizes.values()),
        graphs=tuple(summary(sizes[f"{name}.onnx"]) for name, summary in summaries.items()),
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.rss,
        peak_private_bytes=memory.private,
        verification=verification,
        moved_places=decided.moved,
        kept_wide=decided.half.tensors,
        largest_score=decided.half.scores,
    )


def _max_length(asked: int | None, spec: ModelSpec) -> int:
    if asked is None:
        return spec.max_position_embeddings
    if not 1 <= asked <= spec.max_position_embeddings:
        raise RequestError(
            f"--max-length is {asked}, expected 1 to {spec.max_position_embeddings}: "
            "the checkpoint's position table has no more rows"
        )
    return asked


def _build(
    spec: ModelSpec, target: Target, passes: dict[str, tuple[Pass, ...]], read: ReadParameter
) -> tuple[dict[str, ir.Model], dict[str, Callable[[int], GraphSummary]]]:
    """Every graph with its passes applied; `read` is called when the weights are written."""
    models, summaries = {}, {}
    for name, entry in target.graphs:
        model = build_graph(entry, spec)
        bind_parameters(model, read)
        before, steps = len(model.graph), []
        for rewrite in passes[name]:
            fired = rewrite(model)
            RemoveUnusedNodesPass()(model)
            steps.append(PassSummary(rewrite.__name__, fired, len(model.graph)))
        RemoveUnusedNodesPass()(model)
        drop_builder_notes(model.graph)
        sort_initializers(model.graph)
        operators = dict(sorted(Counter(node.op_type for node in model.graph).items()))
        models[name] = model
        summaries[name] = _summarize(name, before, tuple(steps), operators)
    return models, summaries


def _summarize(
    name: str, before: int, steps: tuple[PassSummary, ...], operators: dict[str, int]
) -> Callable[[int], GraphSummary]:
    return lambda size: GraphSummary(name, size, before, steps, operators)


def _parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the checkpoint holds."""
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def _graph_spec(name: str, model: ir.Model) -> GraphSpec:
    return GraphSpec(
        file=f"{name}.onnx",
        inputs=tuple(_tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in model.graph.outputs),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
    return TensorSpec(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)


def _tools() -> dict[str, str]:
    names = ("neo-onnx", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
