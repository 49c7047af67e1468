"""Limits for a bundle's error against PyTorch on the weights that it stores: `TOLERANCES`.

The "relative L2" error of a position is ‖logits − reference‖ / ‖reference‖ over the vocabulary; the
worst position counts. The reference is transformers' GPT-Neo, `attn_implementation="eager"`, in
float32. For int8 and int4 it uses the dequantized weights, so their rounding does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import is_quantized

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["TOLERANCES", "Tolerance", "tolerance_name"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits for one precision."""

    logits: float
    """Worst relative L2 error of a position's logits."""
    hidden: float
    """Worst relative L2 error of a position's hidden state, at any place of any layer."""
    reason: str
    any_checkpoint: float
    """Limit for the median of `logits` over positions on an unknown checkpoint (`neo-export
    --verify`). Some checkpoints amplify rounding errors, at single positions without bound; a wrong
    step is found by `LOCAL`, whatever the errors before it. On the 1.3B shape with random weights
    (unscaled scores up to 47), PyTorch's own float32 is 1.1e-5 from float64 in the median; on the
    2.7B shape its float16 is 5.4e-2 from float32."""
    of_reference: float | None = None
    """Largest multiple of the reference's own error, relative to more exact arithmetic, if that
    error is known and exceeds `logits`: float32's from float64, float16's from float32. Two results
    of the same quality differ by up to twice that error."""
    typical: float | None = None
    """Limit for the median over the positions of a text, if the worst position is much worse than
    most; None if `logits` is a tight limit for every position."""


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(
        logits=1e-5,
        hidden=1e-5,
        any_checkpoint=1e-4,
        of_reference=2.0,
        reason=(
            "Only the order of float32 sums differs: 2⁻²⁴ a rounding, about √K of them a product "
            "of K terms. On the checkpoints of the tests every place stays below 3e-6. A window "
            "off by one shows as 3e-2 on the 1.3B shape, 300 times what --verify allows."
        ),
    ),
    "fp16": Tolerance(
        logits=5e-3,
        hidden=2e-2,
        any_checkpoint=8e-2,
        of_reference=1.5,
        reason="Weights and activations carry 11 bits (2⁻¹¹ = 5e-4 a rounding), layer upon layer.",
    ),
    "bf16": Tolerance(
        logits=4e-2,
        hidden=1.6e-1,
        any_checkpoint=6e-1,
        reason=(
            "As fp16, with three bits less: 2⁻⁸ = 4e-3 a rounding, eight times the limits. "
            "PyTorch's own bfloat16 is up to 2.3e-2 from its float32 at a position of neo-mini's "
            "held-out text."
        ),
    ),
    "int8": Tolerance(
        logits=8e-2,
        hidden=1e-1,
        any_checkpoint=2e-1,
        typical=1.5e-2,
        reason=(
            "Activations are rounded to 8 bits, one scale per row, before every product: about 1 % "
            "a product. A value on the edge between two integers falls to either side by the order "
            "of float32 sums, and that is passed on: PyTorch with the same rounding differs from "
            "onnxruntime by 7e-3 in the median. Measured: median 1.2e-2, worst position 3.9e-2 on "
            "text and 5.5e-2 on random token ids, worst place inside 4.8e-2; a window off by one "
            "gives 1.1e-1. With activations left exact the same graphs agree within the limit of "
            "fp32."
        ),
    ),
    "int4": Tolerance(
        logits=6e-2,
        hidden=1e-1,
        any_checkpoint=2e-1,
        typical=1.2e-2,
        reason=(
            "As int8, but a block of a row has a scale of its own, so that less is lost. Measured, "
            "blocks of 16 to 64: median 1.0e-2, worst position 4.2e-2; a window off by one "
            "gives 1.2e-1. With activations left exact the same graphs agree within the limit of "
            "fp32."
        ),
    ),
    "fp8": Tolerance(
        logits=2e-1,
        hidden=2e-1,
        any_checkpoint=3e-1,
        typical=1e-1,
        reason=(
            "E4M3 has 4 bits: 2⁻⁴ a rounding, of weights and, with statistics, of activations, "
            "whose scale is one constant a matrix. Measured with both on the demo model: 1.3e-1 "
            "at the worst position of random token ids. With only weights quantized it "
            "agrees with PyTorch on the weights as stored within the limit of fp16."
        ),
    ),
    "mixed": Tolerance(
        logits=8e-2,
        hidden=1e-1,
        any_checkpoint=2e-1,
        typical=1.5e-2,
        reason="As int8, whose activations are the coarser: one scale per token, not a block.",
    ),
    "int8-cache": Tolerance(
        logits=1e-2,
        hidden=1e-2,
        any_checkpoint=5e-2,
        typical=1e-3,
        reason=(
            "float32 weights, keys and values in int8, against PyTorch that rounds them alike. "
            "What differs by the order of a sum may fall to either side of the edge between two "
            "integers: a step of one channel. Most positions see none of that and agree to 1e-5; "
            "the worst were 1e-3. A window off by one, or steps three times as wide, give more "
            "than the limit."
        ),
    ),
}


def tolerance_name(manifest: Manifest, *, rounds_activations: bool) -> str:
    """The key of `TOLERANCES` for a bundle; an int8 cache needs no extra with int8 products.

    Args:
        manifest: the bundle's manifest.
        rounds_activations: whether products round their inputs to integers or to 8-bit floats. If
            only weights are quantized, the reference has the same weights, and only the error of
            float16 is left.
    """
    if is_quantized(manifest.precision):
        return manifest.precision if rounds_activations else "fp16"
    return "int8-cache" if manifest.cache.dtype == "int8" else manifest.precision
