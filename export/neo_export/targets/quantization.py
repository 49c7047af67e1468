"""The requested weight storage of a quantized bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_export.quantize.int4 import largest_block_size
from neo_export.quantize.plan import Storage, WeightPlan

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import ModelSpec

__all__ = ["Quantization"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How int8, int4 and mixed bundles store their weights; other precisions ignore it."""

    block_size: int | None = None
    """int4: inputs that share a scale; None for the largest up to 128 that divides every width."""
    keep: tuple[str, ...] = ()
    """Shell patterns of names in the checkpoint: these weights stay float32."""
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
