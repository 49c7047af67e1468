"""A kind of machine, and how the weights of a bundle for it are stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError
from neo_runtime.manifest import CacheSpec

from neo_export.graphs import GRAPH_NAMES
from neo_export.passes._wide import Wide
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE, fuse_attention
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.select_query import select_query
from neo_export.passes.window_caches import window_caches
from neo_export.quantize.int4 import largest_block_size
from neo_export.quantize.linear import LinearQuantizer
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.quantize.quantizer import EightBits, RoundToNearest

if TYPE_CHECKING:
    from neo_runtime.manifest import ModelSpec

    from neo_export.passes import Pass
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["Quantization", "Target"]


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
