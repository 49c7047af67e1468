"""Refuses options, judging only by the options themselves and the model's shape.

These checks come before calibration and the search for a plan, which may take hours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError

from neo_export.checkpoint.generation_defaults import check_generation_defaults
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE
from neo_export.quantize.int4 import check_block_size, largest_block_size
from neo_export.quantize.kv_cache import check_int8_cache
from neo_export.quantize.plan import WeightPlan, check_patterns, is_planned

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import ModelSpec

    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.decisions.options import ExportOptions
    from neo_export.targets import Target

__all__ = ["check_export", "check_options"]


def check_options(
    spec: ModelSpec, target: Target, options: ExportOptions, *, searches: bool = False
) -> None:
    """Refuse options that contradict each other, the target or the model.

    Args:
        spec: the model.
        target: the target that the options name.
        options: the options of the export.
        searches: whether --auto has yet to find the plan.

    Raises:
        RequestError: an option does not fit; the message names it.
    """
    if searches:
        found = replace(options.quantization, plan=WeightPlan.uniform("int8"))
        options = replace(options, quantization=found)
    target.check_precision(options.precision)
    _check_length(options.max_length, spec)
    if target.attention == "fused" and spec.head_dim % HEAD_SIZE_MULTIPLE:
        raise RequestError(
            f"the model's head size is {spec.head_dim}, but attention for target {target.name} "
            f"needs a multiple of {HEAD_SIZE_MULTIPLE}; export with --target cpu or portable"
        )
    _check_storages(spec, target, options)
    if options.kv_cache == "int8":
        if target.name != "cpu":
            raise RequestError(
                f"--kv-cache int8 cannot be combined with target {target.name}; use --target cpu "
                "with --fp32, --int8, --int4 or --plan, or leave it out"
            )
        length = options.max_length or spec.max_position_embeddings
        check_int8_cache(target.cache(spec, options.precision, length), spec)


def check_export(
    checkpoint: Checkpoint, target: Target, options: ExportOptions, *, searches: bool = False
) -> None:
    """`check_options`, and checks of the tokenizer and the generation defaults.

    Args:
        checkpoint: the model, opened.
        target: the target that the options name.
        options: the options of the export.
        searches: whether --auto has yet to find the plan.

    Raises:
        RequestError: an option does not fit; the message names it.
        CheckpointError: a file besides the weights is damaged or wrong; the message names it.
    """
    check_options(checkpoint.spec, target, options, searches=searches)
    check_generation_defaults(checkpoint, options.max_length)
    checkpoint.tokenizer_json()


def _check_length(asked: int | None, spec: ModelSpec) -> None:
    if asked is not None and not 1 <= asked <= spec.max_position_embeddings:
        raise RequestError(
            f"--max-length is {asked}, expected 1 to {spec.max_position_embeddings}: "
            "the checkpoint's position table has no more rows"
        )


def _check_storages(spec: ModelSpec, target: Target, options: ExportOptions) -> None:
    shapes, quantization = expected_shapes(spec), options.quantization
    if quantization.plan is not None:
        quantization.plan.check_model(shapes, "the plan")
        if options.precision == "mixed" and not target.half_activations:
            quantization.plan.refuse_half(shapes, "the plan")
    check_patterns(quantization.keep, shapes, "--keep-fp32")
    for graph, _ in target.graphs:
        plan = target.plan_for(quantization, graph, options.precision, spec)
        for name, shape in shapes.items():
            storage = plan.of(name) if is_planned(name, shape) else None
            if storage is None:
                continue
            if storage.block_size is not None:
                check_block_size(storage.block_size, shape[1], name)
                target.check_block_size(storage.block_size)
            elif storage.kind == "int8" and target.half_activations:  # stored in blocks, too
                largest_block_size((shape[1],), "--fp16")
