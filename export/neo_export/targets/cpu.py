"""onnxruntime on a CPU: fused operators, cache updated in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import is_quantized

from neo_export.passes.float16 import float16
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.fuse_gelu import fuse_gelu, fuse_gelu_behind_bias
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.half_positions import half_positions
from neo_export.passes.migrate_activations import migrate_activations
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.quantize_cache import quantize_cache_steps
from neo_export.passes.quantize_int4 import quantize_int4_weights
from neo_export.passes.quantize_int8 import quantize_int8_weights
from neo_export.passes.quantize_rows import quantize_rows
from neo_export.passes.select_query import select_query
from neo_export.passes.store_transposed import store_transposed
from neo_export.passes.window_caches import window_caches
from neo_export.targets.target import Target

if TYPE_CHECKING:
    from neo_export.passes import Pass
    from neo_export.targets.context import PassContext

__all__ = ["CPU"]


def _passes(context: PassContext) -> list[Pass]:
    plan, half = context.plan, context.precision == "fp16"
    passes: list[Pass] = []
    if context.migration.in_graph:
        passes.append(migrate_activations(context.migration))
    if context.cache.layout == "in_place":
        # The last layer stays unpacked in every graph, because graphs share weights: select_query.
        pack = pack_qkv(plan, apart=context.spec.num_layers - 1)
        passes += [fuse_attention, pack, select_query]
    if context.cache.window is not None:
        passes.append(window_caches)
    passes.append(fuse_gelu if context.is_decode else fuse_gelu_behind_bias)
    # The fused kernel has twice the error of Add and LayerNormalization (1.3B shape: logits 1.9e-5
    # from float64 with it, 1.1e-5 without, PyTorch 1.3e-5), and takes three times as long for
    # prompts. In half precision it saves the casts between the two; it needs the residual stream
    # and the norm to have one type.
    if half and not context.wide:
        passes.append(fuse_skip_layer_norm)
    if half:
        passes.append(float16(context.wide))
    if plan.mentions("int8"):
        passes.append(quantize_int8_weights(plan, context.quantizer))
    if plan.mentions("int4"):
        passes.append(quantize_int4_weights(plan, context.quantizer))
    if is_quantized(context.precision):
        passes.append(half_positions)
    passes += [quantize_rows, store_transposed]
    if context.cache_steps is not None:
        passes.append(quantize_cache_steps(context.cache_steps, single=context.is_decode))
    return passes


CPU = Target(
    name="cpu",
    precisions=("fp32", "fp16", "int8", "int4", "mixed"),
    passes=_passes,
    # The first version whose GroupQueryAttention supports padded rows with window-sized caches.
    minimum_onnxruntime="1.32.0",
    attention="fused where exact",
    evicts=True,
)
