"""Limits for the error of a single step of a single layer: `LOCAL`. More is a fault."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import is_quantized

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["HALVES", "LOCAL", "LocalLimits", "limits_name"]


@dataclass(frozen=True)
class LocalLimits:
    """Limits for one step of one layer, computed from the bundle's own inputs of that step.

    They limit the relative L2 error of a position's hidden state, against PyTorch on the
    checkpoint's own weights.
    """

    exact: float
    """Worst position, for places that are not the output of a stored matrix: the attention between
    its projections, sums, norms, and the cache's content."""
    product: float
    """Median over the positions of a region, for places that are the output of a stored matrix."""
    held: float
    """Like `product`, if the reference computes the step with the integers in the bundle: only the
    rounding of activations is left."""
    worst: float
    """Worst position, for places that are the output of a stored matrix. A median does not show a
    fault in fewer than half of a region's positions, such as in some rows of a table or in some
    chunks."""
    outlier: float
    """A layer stands out from this multiple of the median over the same place in the other layers.
    Applies only from a tenth of `product` on, and with at least three other layers."""
    reason: str


LOCAL: dict[str, LocalLimits] = {
    "fp32": LocalLimits(
        exact=1e-4,
        product=1e-4,
        held=1e-4,
        worst=1e-3,
        outlier=50.0,
        reason=(
            "Measured at most 3e-6; the rest is for checkpoints that amplify (see "
            "`Tolerance.any_checkpoint`). A wrong matrix gives 1e-1 to 2, a window off by one "
            "1e-3 to 1."
        ),
    ),
    "fp16": LocalLimits(
        exact=1e-2,
        product=1e-2,
        held=1e-2,
        worst=4e-2,
        outlier=20.0,
        reason="Measured at most 2.2e-3, 2⁻¹¹ a rounding, several a step.",
    ),
    "bf16": LocalLimits(
        exact=4e-2,
        product=5e-2,
        held=5e-2,
        worst=2e-1,
        outlier=20.0,
        reason=(
            "As fp16, with three bits less. Measured in ONNX's evaluator, which rounds every step "
            "of a norm: 2.9e-2 after the final norm, 3e-3 at other places that no matrix leads "
            "to, medians up to 3.1e-2 where one does. Another layer's norm gives 8.4e-2 and more, "
            "c_proj without its bias 1.6e-1, a window off by one 1; what out_proj's bias adds to "
            "neo-mini is less than the limit."
        ),
    ),
    "int8": LocalLimits(
        exact=1e-4,
        product=1e-1,
        held=5e-2,
        worst=5e-1,
        outlier=4.0,
        reason=(
            "Weights in 7 bits with one scale per channel, activations in 8: measured medians 0.7 "
            "to 3.2 % a product, 5 % at the worst position of neo-mini; what is wrong there is off "
            "by 1 and more. What lies between the products is computed in float32."
        ),
    ),
    "fp8": LocalLimits(
        exact=1e-4,
        product=1e-1,
        held=1e-1,
        worst=5e-1,
        outlier=4.0,
        reason=(
            "Weights in 4 bits of precision with one scale per channel, activations too: measured "
            "medians below 6 % a product, 9 % at the worst position of neo-mini."
        ),
    ),
    "int4": LocalLimits(
        exact=1e-4,
        product=3e-1,
        held=5e-2,
        worst=8e-1,
        outlier=4.0,
        reason=(
            "Weights in 4 bits: measured medians 4 to 15 % a product, blocks of 64, 24 % at the "
            "worst position of neo-mini; what is wrong there is off by 1 and more. What lies "
            "between the products is computed in float32."
        ),
    ),
}
for _kind in ("int8", "int4", "fp8"):
    LOCAL[f"{_kind}-half"] = replace(
        LOCAL[_kind],
        exact=LOCAL["fp16"].exact,
        held=2 * LOCAL["fp16"].held,
        reason=(
            f"As {_kind}; what lies between the products is computed in float16, and so is what "
            "reads held weights: at most 1.1e-3 on onnxruntime's CPU provider. The kernels of a "
            "GPU may also add in half precision; none has been measured."
        ),
    )


HALVES = ("float16", "bfloat16")
"""Half-precision types of the cache, and so of the activations."""


def limits_name(manifest: Manifest) -> str:
    """The key of `LOCAL` for a bundle: its precision, and the type of its activations."""
    kind = {"mixed": "int4"}.get(manifest.precision, manifest.precision)
    return f"{kind}-half" if is_quantized(kind) and manifest.cache.dtype in HALVES else kind
