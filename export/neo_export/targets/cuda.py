"""onnxruntime on an NVIDIA GPU: like the CPU, in half precision, replayed as a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_export.passes.candidates import candidates
from neo_export.passes.device_lengths import device_lengths
from neo_export.passes.exact_activations import exact_activations
from neo_export.passes.float16 import bfloat16, float16
from neo_export.passes.fold_bias import fold_bias
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.fuse_gelu import fuse_gelu
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.migrate_activations import migrate_activations
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.pad_head import pad_head
from neo_export.passes.quantize_int4 import quantize_int4_weights
from neo_export.passes.quantize_int8_blocks import quantize_int8_blocks
from neo_export.passes.store_transposed import store_transposed
from neo_export.targets.target import Target

if TYPE_CHECKING:
    from neo_export.passes import Pass
    from neo_export.targets.context import PassContext

__all__ = ["CUDA"]


def _passes(context: PassContext) -> list[Pass]:
    # No window_caches: the CUDA kernel supports padded rows with window-sized caches from 1.32 on,
    # and the wheel for GPUs is 1.31. It reads only the window in any case.
    plan = context.plan
    passes: list[Pass] = []
    if context.migration.in_graph:
        passes.append(migrate_activations(context.migration))
    passes += [fuse_attention, pack_qkv(plan), fuse_gelu, device_lengths]
    if not context.wide:  # residual stream and norm are one operator of one type
        passes.append(fuse_skip_layer_norm)
    passes.append(fold_bias)
    if plan.mentions("int8"):
        passes.append(quantize_int8_blocks(plan, context.quantizer))
    if plan.mentions("int4"):
        passes += [quantize_int4_weights(plan, context.quantizer), exact_activations]
    passes.append(bfloat16 if context.precision == "bf16" else float16(context.wide))
    passes += [store_transposed, pad_head]
    if context.graph != "score":
        passes.append(candidates)
    return passes


CUDA = Target(
    name="cuda",
    precisions=("fp16", "bf16", "int8", "int4", "mixed"),
    passes=_passes,
    minimum_onnxruntime="1.31.0",
    attention="fused",  # its CUDA kernels always compute scores in float32
    half_activations=True,
    block_sizes=(16, 32, 64, 128),  # with others the kernel for one row throws
)
