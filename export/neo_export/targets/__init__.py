"""What each kind of machine runs: the list of targets, and the passes of a graph of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError
from neo_runtime.manifest import is_quantized

from neo_export.passes.candidates import candidates
from neo_export.passes.device_lengths import device_lengths
from neo_export.passes.exact_activations import exact_activations
from neo_export.passes.float16 import bfloat16, float16_except
from neo_export.passes.fold_bias import fold_bias
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.fuse_gelu import fuse_gelu, fuse_gelu_behind_bias
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.half_positions import half_positions
from neo_export.passes.pack_qkv import pack_qkv, pack_qkv_alike
from neo_export.passes.pad_head import pad_head
from neo_export.passes.quantize_int4 import quantize_int4_weights
from neo_export.passes.quantize_int8 import quantize_int8_weights
from neo_export.passes.quantize_int8_blocks import quantize_int8_blocks
from neo_export.passes.quantize_linear import quantize_linear_weights
from neo_export.passes.quantize_rows import quantize_rows
from neo_export.passes.select_query import select_query
from neo_export.passes.static_cache import static_cache
from neo_export.passes.store_transposed import store_transposed
from neo_export.passes.window_caches import window_caches
from neo_export.targets.target import Quantization, Target

if TYPE_CHECKING:
    from neo_runtime.manifest import ModelSpec

    from neo_export.passes import Pass
    from neo_export.passes.quantize_linear import ActivationRange
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["TARGETS", "Quantization", "Target", "passes_for", "target_named"]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            summary="onnxruntime on a CPU: fused operators, cache updated in place",
            precisions=("fp32", "fp16", "int8", "int4", "mixed"),
            fusions=(
                fuse_attention,
                pack_qkv,
                select_query,
                window_caches,
                fuse_gelu,
                fuse_skip_layer_norm,
            ),
            storage=(quantize_rows, store_transposed),
            fused=True,
            many_tokens=((fuse_gelu, fuse_gelu_behind_bias),),
            # The first whose GroupQueryAttention takes padded rows into window-sized caches.
            minimum_onnxruntime="1.32.0",
        ),
        Target(
            name="cuda",
            summary="onnxruntime on an NVIDIA GPU: as cpu, in half precision, replayed as a graph",
            precisions=("fp16", "bf16", "int8", "int4", "mixed"),
            # No window_caches: CUDA's kernel takes padded rows into window-sized caches from
            # 1.32 on, and the wheel for GPUs is 1.31. It reads no more than the window anyway.
            fusions=(
                fuse_attention,
                pack_qkv,
                fuse_gelu,
                device_lengths,
                fuse_skip_layer_norm,
                fold_bias,
            ),
            storage=(store_transposed, pad_head),
            fused=True,
            minimum_onnxruntime="1.31.0",
            half_activations=True,
            finds_candidates=True,
            needs_fused=True,
        ),
        Target(
            name="portable",
            summary="standard ONNX operators only: any runtime, any attention mask",
            precisions=("fp32", "fp16"),
            fusions=(),
            storage=(store_transposed,),
            fused=False,
            minimum_onnxruntime="1.17.0",
        ),
        Target(
            name="tensorrt",
            summary="TensorRT: opset 24, cache of static length, one graph for prompts and scoring",
            precisions=("fp32", "fp16", "bf16", "int8", "int4", "fp8"),
            fusions=(),
            storage=(store_transposed,),
            fused=False,
            # Older ones have no TensorScatter.
            minimum_onnxruntime="1.24.0",
            graphs=(("prefill", "selective"), ("decode", "decode")),
            static_cache=True,
            quantize_linear=True,
        ),
    )
}


def target_named(name: str) -> Target:
    """Look a target up.

    Raises:
        RequestError: there is no such target.
    """
    if name not in TARGETS:
        raise RequestError(f"target {name!r} is unknown, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def passes_for(
    target: Target,
    precision: str,
    graph: str,
    spec: ModelSpec,
    quantization: Quantization | None = None,
    quantizer: WeightQuantizer | None = None,
    max_length: int | None = None,
    largest_input: ActivationRange | None = None,
) -> tuple[Pass, ...]:
    """Every pass that one graph of an export goes through, in order.

    Args:
        target: the kind of machine.
        precision: one of the target's.
        graph: name of the bundle's graph.
        spec: the model.
        quantization: for int8 and int4.
        quantizer: what makes the integers; None for rounding to nearest.
        max_length: positions of a static cache; None for all that the checkpoint has.
        largest_input: the largest |x| of each matrix's input, for targets that quantize inputs
            by a constant scale.

    Raises:
        RequestError: the target has no such precision.
    """
    target.check_precision(precision)
    plan = target.plan_for(quantization or Quantization(), graph, precision, spec)
    others = dict(() if graph == "decode" else target.many_tokens)
    fusions = tuple(others.get(f, f) for f in target.fusions)
    # In every graph: they share the weights.
    apart = spec.num_layers - 1 if select_query in fusions else None
    fusions = tuple(pack_qkv_alike(plan, apart) if f is pack_qkv else f for f in fusions)
    if precision not in ("fp16", "bf16") and not target.half_activations:
        # The CPU's kernel is half as exact as Add and LayerNormalization are (1.3B shape: logits
        # 1.9e-5 from float64 with it, 1.1e-5 without, PyTorch 1.3e-5), and three times as slow
        # for prompts. In half precision it spares the casts between the two.
        fusions = tuple(fusion for fusion in fusions if fusion is not fuse_skip_layer_norm)
    if target.static_cache:
        length = max_length or spec.max_position_embeddings
        fusions = (static_cache(length), *fusions)
    storage = target.storage
    if target.finds_candidates and graph != "score":
        storage += (candidates,)
    if target.quantize_linear and is_quantized(precision):
        fusions = (*fusions, quantize_linear_weights(plan, largest_input))
        precision = "fp16"
    return fusions + _of_precision(target, precision, plan, quantizer) + storage


def _of_precision(
    target: Target, precision: str, plan: WeightPlan, quantizer: WeightQuantizer | None
) -> tuple[Pass, ...]:
    if precision == "fp16":
        return (float16_except(target.wide),)
    if precision == "bf16":
        return (bfloat16,)
    if precision == "fp32":
        return ()
    found = {storage.kind for storage in (plan.default, *(s for _, s in plan.weights))}
    passes: tuple[Pass, ...] = ()
    if target.half_activations:
        if "int8" in found:
            passes += (quantize_int8_blocks(plan, quantizer),)
        if "int4" in found:
            passes += (quantize_int4_weights(plan, quantizer), exact_activations)
        return (*passes, float16_except(target.wide))
    if "int8" in found:
        passes += (quantize_int8_weights(plan, quantizer),)
    if "int4" in found:
        passes += (quantize_int4_weights(plan, quantizer),)
    return (*passes, half_positions)
