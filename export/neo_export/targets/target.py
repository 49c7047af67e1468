"""A target: a kind of machine, the options of a bundle for it, and the passes for its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from neo_runtime.bundle.manifest import CacheSpec
from neo_runtime.errors import RequestError

from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.gpt_neo.parameters import EMBEDDING, HEAD
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE
from neo_export.quantize.int4 import BLOCK_SIZES
from neo_export.quantize.linear import LinearQuantizer
from neo_export.quantize.quantizer import EightBits, RoundToNearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.bundle.manifest import ModelSpec

    from neo_export.passes import Pass
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer
    from neo_export.targets.context import PassContext
    from neo_export.targets.quantization import Quantization

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of machine."""

    name: str
    precisions: tuple[str, ...]
    passes: Callable[[PassContext], list[Pass]]
    """Every pass that one graph goes through, in order."""
    minimum_onnxruntime: str
    graphs: tuple[tuple[str, str], ...] = tuple((name, name) for name in GRAPH_NAMES)
    """Each graph of the bundle, and its entry point in `neo_export.gpt_neo.graphs`."""
    attention: Literal["standard", "fused", "fused where exact"] = "standard"
    """Fused means onnxruntime's own operator: right padding, cache updated in place."""
    evicts: bool = False
    """Whether caches of local layers keep only the window. This needs fused attention and a model
    that has global layers, too."""
    static_cache: bool = False
    """Whether caches have exactly `max_length` positions, which is fixed in the bundle."""
    quantize_linear: bool = False
    """Whether quantized weights reach their products through DequantizeLinear; then activations are
    float16, and token embedding and head are not quantized."""
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    """The supported block sizes of int4."""
    half_activations: bool = False
    """Whether kernels dequantize the quantized weights, and activations are float16."""

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the target does not have.

        Raises:
            RequestError: the precision is refused; the message lists those that exist.
        """
        if precision not in self.precisions:
            raise RequestError(
                f"target {self.name} does not support precision {precision!r}, "
                f"expected one of {', '.join(self.precisions)}"
            )

    def check_block_size(self, size: int) -> None:
        """Refuse an int4 block size that the target's operators do not support.

        Raises:
            RequestError: the size is refused; the message lists the supported sizes.
        """
        if size not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            raise RequestError(
                f"target {self.name} has no int4 in blocks of {size}, expected one of {sizes}"
            )

    def plan_for(
        self, quantization: Quantization, graph: str, precision: str, spec: ModelSpec
    ) -> WeightPlan:
        """The storage of every matrix as one graph of this target reads it.

        Raises:
            RequestError: an int8 copy for prefill is asked for, and the target has none.
        """
        if quantization.int8_prefill and self.static_cache:
            raise RequestError(
                f"--int8-prefill was given with target {self.name}, where one graph serves prompts "
                "and decoding; leave it out"
            )
        plan = quantization.plan_for(graph, precision, spec)
        return plan.keeping((EMBEDDING, HEAD)) if self.quantize_linear else plan

    def rounds_activations(self, precision: str) -> bool:
        """Whether products may round activations to integers; only then outliers are migrated."""
        return not self.quantize_linear or precision == "int8"

    @property
    def quantizer(self) -> WeightQuantizer | LinearQuantizer:
        """The quantizer of weights that is used without calibration."""
        if self.quantize_linear:
            return LinearQuantizer()
        return EightBits() if self.half_activations else RoundToNearest()

    def cache(
        self, spec: ModelSpec, precision: str, max_length: int, *, large_scores: bool = False
    ) -> CacheSpec:
        """How this target keeps keys and values.

        Args:
            spec: the model.
            precision: one of the target's precisions.
            max_length: largest number of positions in a sequence.
            large_scores: whether attention scores may exceed float16 (`HalfRange.scores`).
        """
        dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
        if self.half_activations and precision != "bf16":
            dtype = "float16"
        if self.static_cache:
            dtype = dtype if precision in ("fp32", "bf16") else "float16"
            return CacheSpec(layout="static", padding="right", dtype=dtype, window=None)
        if not self._fuses_attention(spec, large_scores=large_scores):
            return CacheSpec(layout="append", padding="left", dtype=dtype, window=None)
        # The operator takes no buffer shorter than the window, even for shorter sequences.
        is_passed = max_length > spec.window_size
        evicts = self.evicts and is_passed and "global" in spec.attention_layers
        window = spec.window_size if evicts else None
        return CacheSpec(layout="in_place", padding="right", dtype=dtype, window=window)

    def _fuses_attention(self, spec: ModelSpec, *, large_scores: bool) -> bool:
        if self.attention == "fused where exact":
            # onnxruntime's kernel computes scores in float16 on processors that have it
            # (MlasGQASupported: ARM64), and in float32 on others.
            return not large_scores and spec.head_dim % HEAD_SIZE_MULTIPLE == 0
        return self.attention == "fused"
