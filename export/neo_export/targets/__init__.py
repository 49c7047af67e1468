"""What each kind of machine runs: which passes, and what the cache looks like then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError
from neo_runtime.manifest import CacheSpec

from neo_export.passes.float16 import float16
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE, fuse_attention
from neo_export.passes.fuse_gelu import fuse_gelu
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.half_positions import half_positions
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.quantize_int4 import quantize_int4_weights
from neo_export.passes.quantize_int8 import quantize_int8_weights
from neo_export.passes.store_transposed import store_transposed
from neo_export.passes.window_caches import window_caches
from neo_export.quantize.int4 import largest_block_size

if TYPE_CHECKING:
    from neo_runtime.manifest import ModelSpec

    from neo_export.passes import Pass

__all__ = ["TARGETS", "Quantization", "Target", "passes_for", "target_named"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How int8 and int4 bundles store their weights; the others ignore it."""

    block_size: int | None = None
    """int4: inputs that share a scale; None for the largest up to 128 that divides every width."""
    keep: tuple[str, ...] = ()
    """Shell patterns of the checkpoint's names: these weights stay float32."""
    int8_prefill: bool = False
    """int4: prefill and score read a second, int8 copy of the weights."""

    def resolved(self, precision: str, spec: ModelSpec) -> Quantization:
        """The same with the block size decided, where int4 needs one."""
        if precision != "int4" or self.block_size is not None:
            return self
        return replace(
            self, block_size=largest_block_size((spec.hidden_size, spec.intermediate_size))
        )

    def precision_of(self, graph: str, precision: str) -> str:
        """How one graph of a bundle of this precision reads its weights."""
        if precision == "int4" and self.int8_prefill and graph != "decode":
            return "int8"
        return precision


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

    def cache(self, spec: ModelSpec, precision: str) -> CacheSpec:
        """How this target keeps keys and values for this model."""
        dtype = "float16" if precision == "fp16" else "float32"
        if not self.fused or spec.head_dim % HEAD_SIZE_MULTIPLE:
            return CacheSpec(layout="append", padding="left", dtype=dtype, window=None)
        window = spec.window_size if "global" in spec.attention_layers else None
        return CacheSpec(layout="in_place", padding="right", dtype=dtype, window=window)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            summary="onnxruntime on a CPU: fused operators, cache updated in place",
            precisions=("fp32", "fp16", "int8", "int4"),
            fusions=(fuse_attention, pack_qkv, window_caches, fuse_gelu, fuse_skip_layer_norm),
            storage=(store_transposed,),
            fused=True,
            # The first whose GroupQueryAttention takes padded rows into window-sized caches.
            minimum_onnxruntime="1.32.0",
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
) -> tuple[Pass, ...]:
    """Every pass that one graph of an export goes through, in order.

    Raises:
        RequestError: the target has no such precision.
    """
    if precision not in target.precisions:
        raise RequestError(
            f"target {target.name} has no precision {precision!r}, "
            f"expected one of {', '.join(target.precisions)}"
        )
    quantization = quantization or Quantization()
    precision = quantization.precision_of(graph, precision)
    fusions = target.fusions
    if precision != "fp16":
        # The CPU's kernel is half as exact as Add and LayerNormalization are (1.3B shape: logits
        # 1.9e-5 from float64 with it, 1.1e-5 without, PyTorch 1.3e-5), and three times as slow
        # for prompts. In half precision it spares the casts between the two.
        fusions = tuple(fusion for fusion in fusions if fusion is not fuse_skip_layer_norm)
    return fusions + _of_precision(precision, spec, quantization) + target.storage


def _of_precision(precision: str, spec: ModelSpec, quantization: Quantization) -> tuple[Pass, ...]:
    if precision == "fp16":
        return (float16,)
    if precision == "int8":
        return (quantize_int8_weights(quantization.keep), half_positions)
    if precision == "int4":
        block_size = quantization.resolved(precision, spec).block_size
        assert block_size is not None
        return (quantize_int4_weights(block_size, quantization.keep), half_positions)
    return ()
