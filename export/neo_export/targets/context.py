"""The inputs that a target's passes for one graph depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neo_export.passes._wide import Wide
from neo_export.quantize.migration import Migration

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import CacheSpec, ModelSpec

    from neo_export.passes.quantize_linear import ActivationRange
    from neo_export.quantize.kv_cache import CacheSteps
    from neo_export.quantize.plan import WeightPlan
    from neo_export.quantize.quantizer import WeightQuantizer

__all__ = ["PassContext"]


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """One graph of an export, and the decisions for it."""

    graph: str
    """Name of the bundle's graph."""
    precision: str
    """One of the target's precisions."""
    spec: ModelSpec
    plan: WeightPlan
    """The storage of every matrix as this graph reads it."""
    cache: CacheSpec
    """How the bundle keeps keys and values."""
    max_length: int
    """Largest number of positions in a sequence."""
    quantizer: WeightQuantizer | None = None
    """Computes int8 and int4 weights; None for rounding to nearest."""
    wide: Wide = field(default_factory=Wide)
    """The tensors that stay float32 in half precision."""
    migration: Migration = field(default_factory=Migration)
    """The activation outliers that are moved into the weights."""
    largest_input: ActivationRange | None = None
    """The largest |x| of each matrix's input, for inputs that are quantized with a static scale."""
    cache_steps: CacheSteps | None = None
    """The quantization steps of an int8 cache."""

    @property
    def is_decode(self) -> bool:
        """Whether the graph takes one new token per row; the others take many."""
        return self.graph == "decode"
