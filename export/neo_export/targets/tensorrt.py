"""TensorRT: opset 24, cache of static length, one graph for prompts and scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import is_quantized

from neo_export.passes.float16 import bfloat16, float16
from neo_export.passes.migrate_activations import migrate_activations
from neo_export.passes.quantize_linear import quantize_linear_weights
from neo_export.passes.static_cache import static_cache
from neo_export.passes.store_transposed import store_transposed
from neo_export.targets.target import Target

if TYPE_CHECKING:
    from neo_export.passes import Pass
    from neo_export.targets.context import PassContext

__all__ = ["TENSORRT"]


def _passes(context: PassContext) -> list[Pass]:
    passes: list[Pass] = []
    if context.migration.in_graph:
        passes.append(migrate_activations(context.migration))
    passes.append(static_cache(context.max_length))
    if is_quantized(context.precision):
        passes.append(quantize_linear_weights(context.plan, context.largest_input))
    if context.precision == "bf16":
        passes.append(bfloat16)
    elif context.precision != "fp32":
        passes.append(float16(context.wide))
    passes.append(store_transposed)
    return passes


TENSORRT = Target(
    name="tensorrt",
    precisions=("fp32", "fp16", "bf16", "int8", "int4", "fp8"),
    passes=_passes,
    # Older versions have no TensorScatter.
    minimum_onnxruntime="1.24.0",
    graphs=(("prefill", "selective"), ("decode", "decode")),
    static_cache=True,
    quantize_linear=True,
)
