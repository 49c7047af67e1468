"""What each kind of machine runs: which passes, and what the cache looks like then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError
from neo_runtime.manifest import CacheSpec, is_quantized

from neo_export.graphs import GRAPH_NAMES
from neo_export.passes._wide import Wide
from neo_export.passes.candidates import candidates
from neo_export.passes.device_lengths import device_lengths
from neo_export.passes.exact_activations import exact_activations
from neo_export.passes.float16 import bfloat16, float16_except
from neo_export.passes.fold_bias import fold_bias
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE, fuse_attention
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
from neo_export.quantize.int4 import largest_block_size
from neo_export.quantize.linear import LinearQuantizer
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.quantize.quantizer import EightBits, RoundToNearest

if TYPE_CHECKING:
    from neo_runtime.manifest import ModelSpec

    from neo_export.passes import Pass
    from neo_export.passes.quantize_linear import ActivationRange
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["TARGETS", "Quantization", "Target", "passes_for", "target_named"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How int8, int4 and mixed bundles store their weights; to the others it means nothing."""

    block_size: int | None = None
    """int4: inputs that share a scale; None for the largest up to 128 that divides every width."""
    keep: tuple[str, ...] = ()
    """Shell patterns of the checkpoint's names: these weights stay float32."""
    int8_prefill: bool = False
    """int4, mixed: prefill and score read a second, int8 copy of the int4 weights."""
    plan: WeightPlan | None = None
    """mixed: the storage of every matrix."""

    def plan_for(self, graph: str, precision: str, spec: ModelSpec) -> WeightPlan:
        """The storage of every matrix as one graph of a bundle of this precision reads it."""
        if precision in ("fp32", "fp16", "bf16"):
            return WeightPlan.uniform("fp32" if precision == "fp32" else "fp16")
        if precision == "mixed":
            assert self.plan is not None
            plan = self.plan
        elif precision == "int4":
            widths = (spec.hidden_size, spec.intermediate_size)
            size = largest_block_size(widths) if self.block_size is None else self.block_size
            plan = WeightPlan.uniform("int4", size)
        else:
            plan = WeightPlan.uniform(precision)
        if self.int8_prefill and graph != "decode":
            plan = plan.replacing("int4", Storage("int8"))
        return plan.keeping(self.keep)


_TABLES = ("transformer.wte.weight", "lm_head.weight")


@dataclass(frozen=True)
class Target:
    """A kind of machine, as lists of passes in the order in which they run.

    Those of the precision run between `fusions` and `storage`.
    """

    name: str
    summary: str
    precisions: tuple[str, ...]
    fusions: tuple[Pass, ...]
    storage: tuple[Pass, ...]
    fused: bool
    """Uses onnxruntime's own operators: right padding, cache updated in place."""
    minimum_onnxruntime: str
    graphs: tuple[tuple[str, str], ...] = tuple((name, name) for name in GRAPH_NAMES)
    """Each graph of the bundle, and the entry point of `neo_export.graphs` that it is made of."""
    static_cache: bool = False
    """Caches of the bundle's own `max_length`, no more and no less."""
    quantize_linear: bool = False
    """Quantized weights reach their products through DequantizeLinear, activations are float16,
    and the tables of tokens are not quantized."""

    half_activations: bool = False
    """Quantized weights are dequantized in the kernel, for activations in float16."""
    many_tokens: tuple[tuple[Pass, Pass], ...] = ()
    """Fusions, and what takes their place in graphs that take many tokens at once."""

    finds_candidates: bool = False
    """Prefill and decode find the best tokens themselves (`passes.candidates`)."""

    needs_fused: bool = False
    """Has no attention but the fused one."""

    wide: Wide = field(default_factory=Wide)
    """What stays float32 in half precision."""

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the target does not have.

        Raises:
            RequestError: says which it has.
        """
        if precision not in self.precisions:
            raise RequestError(
                f"target {self.name} has no precision {precision!r}, "
                f"expected one of {', '.join(self.precisions)}"
            )

    def keeping_wide(self, wide: Wide) -> Target:
        """The same target for a checkpoint of which some tensors do not fit float16."""
        if not wide:
            return self
        # Residual stream and norm are one operator of one type there.
        fusions = tuple(f for f in self.fusions if f is not fuse_skip_layer_norm)
        return replace(self, wide=wide, fusions=fusions)

    def in_standard_attention(self) -> Target:
        """The same target with attention in standard operators: scores are float32 everywhere.

        onnxruntime's fused attention computes them in float16 on processors that have kernels for
        it (MlasGQASupported: ARM64), and in float32 on others.
        """
        fused = (fuse_attention, pack_qkv, select_query, window_caches)
        return replace(self, fused=False, fusions=tuple(f for f in self.fusions if f not in fused))

    def plan_for(
        self, quantization: Quantization, graph: str, precision: str, spec: ModelSpec
    ) -> WeightPlan:
        """The storage of every matrix as one graph of this target reads it.

        Raises:
            RequestError: the target has one graph for prompts and for decoding.
        """
        if quantization.int8_prefill and self.static_cache:
            raise RequestError(
                f"--int8-prefill was given with target {self.name}, where one graph serves prompts "
                "and decoding; leave it out"
            )
        plan = quantization.plan_for(graph, precision, spec)
        return plan.keeping(_TABLES) if self.quantize_linear else plan

    def rounds_activations(self, precision: str) -> bool:
        """Whether products may round activations to integers: only then are outliers moved."""
        return not self.quantize_linear or precision == "int8"

    @property
    def quantizer(self) -> WeightQuantizer | LinearQuantizer:
        """What makes integers of weights where nothing else was asked for."""
        if self.quantize_linear:
            return LinearQuantizer()
        return EightBits() if self.half_activations else RoundToNearest()

    def cache(self, spec: ModelSpec, precision: str) -> CacheSpec:
        """How this target keeps keys and values for this model."""
        dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
        if self.half_activations and precision != "bf16":
            dtype = "float16"
        if self.static_cache:
            dtype = dtype if precision in ("fp32", "bf16") else "float16"
            return CacheSpec(layout="static", padding="right", dtype=dtype, window=None)
        if not self.fused or spec.head_dim % HEAD_SIZE_MULTIPLE:
            return CacheSpec(layout="append", padding="left", dtype=dtype, window=None)
        evicts = window_caches in self.fusions and "global" in spec.attention_layers
        window = spec.window_size if evicts else None
        return CacheSpec(layout="in_place", padding="right", dtype=dtype, window=window)


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
