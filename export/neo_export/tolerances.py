"""How far a bundle may be off from PyTorch, in one table, with the reason for each figure.

"Relative L2" of a position is ‖logits − reference‖ / ‖reference‖ over the vocabulary; the worst
position counts. The reference is transformers' GPT-Neo, `attn_implementation="eager"`, float32; for
int8 and int4 running on the dequantized weights, so that what the weights lost is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neo_runtime.manifest import is_quantized

if TYPE_CHECKING:
    from neo_runtime.manifest import Manifest

__all__ = [
    "HALVES",
    "LOCAL",
    "QUALITY",
    "TOLERANCES",
    "LocalLimits",
    "Quality",
    "Tolerance",
    "limits_name",
    "quality_of",
    "tolerance_name",
]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits for one precision."""

    logits: float
    """Worst relative L2 error of a position's logits."""
    hidden: float
    """Worst relative L2 error of a position's hidden state, at any place of any layer."""
    reason: str
    any_checkpoint: float
    """What is allowed for `logits` and `hidden` on a checkpoint that nothing is known of. Some
    amplify rounding: on the 1.3B shape with random weights (unscaled scores up to 47) PyTorch's
    float32 is itself up to 1.9e-5 from float64, its float16 2.2e-2 and its bfloat16 1.5e-1 from
    float32."""
    any_attention: float | None = None
    """The same for `attended` and `attention`, where that is more than `any_checkpoint`. A mean of
    values is small where the tokens seen have little in common: in layer 17 of that checkpoint
    PyTorch's float16 is up to 5.4e-2, its bfloat16 3.5e-1 from float32. (A wrong step is seen by
    `LOCAL`, whatever came before it.)"""
    of_reference: float | None = None
    """Largest multiple of the reference's own distance from more exact arithmetic, where that is
    known and passes `logits`: float32's from float64, float16's from float32. Two results of the
    same quality are up to twice that apart."""
    typical: float | None = None
    """Largest median over the positions of a text, where the worst one is much worse than most;
    None where `logits` is a close limit for every position alike."""

    def of_place(self, place: str) -> float:
        """What is allowed at one place of a checkpoint that nothing is known of."""
        wide = self.any_attention if place in ("attended", "attention") else None
        return self.any_checkpoint if wide is None else wide


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
        any_checkpoint=4e-2,
        any_attention=1e-1,
        of_reference=1.5,
        reason="Weights and activations carry 11 bits (2⁻¹¹ = 5e-4 a rounding), layer upon layer.",
    ),
    "bf16": Tolerance(
        logits=4e-2,
        hidden=1.6e-1,
        any_checkpoint=3e-1,
        any_attention=7e-1,
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
            "Activations are rounded to 8 bits, a scale a row, before every product: about 1 % a "
            "product. A value on the edge between two integers falls to either side by the order "
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
            "at the worst position of random token ids. Weights alone agree with PyTorch on the "
            "weights as stored within the limit of fp16."
        ),
    ),
    "mixed": Tolerance(
        logits=8e-2,
        hidden=1e-1,
        any_checkpoint=2e-1,
        typical=1.5e-2,
        reason="As int8, whose activations are the coarser: a scale a token, not a block.",
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
    """Which of `TOLERANCES` a bundle is held to: next to int8 products an int8 cache adds nothing.

    Args:
        manifest: of the bundle.
        rounds_activations: whether products round their inputs to integers or to 8-bit floats;
            where weights alone are quantized, and the reference has those weights, what is left
            is float16.
    """
    if is_quantized(manifest.precision):
        return manifest.precision if rounds_activations else "fp16"
    return "int8-cache" if manifest.cache.dtype == "int8" else manifest.precision


@dataclass(frozen=True)
class LocalLimits:
    """Limits for one step of one layer, computed from the bundle's own inputs of that step.

    Relative L2 of a position's hidden state, against PyTorch on the checkpoint's own weights.
    """

    exact: float
    """Worst position, where no stored matrix leads to the place: the attention between its
    projections, sums, norms, and what the cache holds."""
    product: float
    """Median over the positions of a region, where a stored matrix leads to the place."""
    held: float
    """The same where the step was computed from the integers that the bundle holds, so that only
    the rounding of activations is left."""
    outlier: float
    """Multiple of the median over the other layers' same place from which on a layer stands out.
    Counts only from a tenth of `product` on, and where at least three other layers are there."""
    reason: str


LOCAL: dict[str, LocalLimits] = {
    "fp32": LocalLimits(
        exact=1e-4,
        product=1e-4,
        held=1e-4,
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
        outlier=20.0,
        reason="Measured at most 2.2e-3, 2⁻¹¹ a rounding, several a step.",
    ),
    "bf16": LocalLimits(
        exact=4e-2,
        product=5e-2,
        held=5e-2,
        outlier=20.0,
        reason=(
            "As fp16, with three bits less. Measured in ONNX's evaluator, which rounds every step "
            "of a norm: 2.9e-2 behind the final norm, 3e-3 at other places that no matrix leads "
            "to, medians up to 3.1e-2 where one does. Another layer's norm gives 8.4e-2 and more, "
            "c_proj without its bias 1.6e-1, a window off by one 1; what out_proj's bias adds to "
            "neo-mini is less than the limit."
        ),
    ),
    "int8": LocalLimits(
        exact=1e-4,
        product=1e-1,
        held=5e-2,
        outlier=4.0,
        reason=(
            "Weights in 7 bits with a scale a channel and activations in 8: measured medians 0.7 "
            "to 3.2 % a product. What lies between the products is computed in float32."
        ),
    ),
    "fp8": LocalLimits(
        exact=1e-4,
        product=1e-1,
        held=1e-1,
        outlier=4.0,
        reason=(
            "Weights in 4 bits of precision with a scale a channel, activations too: measured "
            "medians below 5 % a product."
        ),
    ),
    "int4": LocalLimits(
        exact=1e-4,
        product=3e-1,
        held=5e-2,
        outlier=4.0,
        reason=(
            "Weights in 4 bits: measured medians 4 to 13 % a product, blocks of 64. What lies "
            "between the products is computed in float32."
        ),
    ),
}
for _kind in ("int8", "int4", "fp8"):
    LOCAL[f"{_kind}-half"] = replace(
        LOCAL[_kind],
        exact=LOCAL["fp16"].exact,
        reason=f"As {_kind}; what lies between the products is computed in float16.",
    )


HALVES = ("float16", "bfloat16")
"""Types of a cache, and so of activations, in half precision."""


def limits_name(manifest: Manifest) -> str:
    """Which of `LOCAL` a bundle is held to: its precision, and how it computes between products."""
    kind = {"mixed": "int4"}.get(manifest.precision, manifest.precision)
    return f"{kind}-half" if is_quantized(kind) and manifest.cache.dtype in HALVES else kind


@dataclass(frozen=True)
class Quality:
    """What `neo-diff` asks of a bundle's logits unless told otherwise: may it ship?

    Against PyTorch in float32 on the checkpoint's own weights, over all scored positions.
    """

    max_kl: float
    """Mean KL(reference ‖ bundle), nats."""
    min_top_1: float
    """Share of positions whose best token is the same."""
    max_perplexity_increase: float
    """bundle / reference − 1."""
    max_logit_error: float
    """Median over positions of the relative L2 error of the logits."""
    reason: str


QUALITY: dict[str, Quality] = {
    "fp32": Quality(
        max_kl=1e-7,
        min_top_1=0.999,
        max_perplexity_increase=1e-4,
        max_logit_error=1e-4,
        reason=(
            "The same model but for the order of sums: what differs is rounding, and the best "
            "token changes only where two are equal to seven digits."
        ),
    ),
    "fp16": Quality(
        max_kl=1e-3,
        min_top_1=0.99,
        max_perplexity_increase=5e-3,
        max_logit_error=2e-2,
        reason="Rounding to 11 bits, a thousandth of the distances that sampling works on.",
    ),
    "bf16": Quality(
        max_kl=5e-3,
        min_top_1=0.96,
        max_perplexity_increase=5e-3,
        max_logit_error=3e-2,
        reason=(
            "Rounding to 8 bits. PyTorch's own bfloat16 on neo-mini's held-out text: KL 1.4e-4, "
            "top-1 99.1 %, perplexity +0.05 %, logits 4.0e-3 from its float32."
        ),
    ),
    "int8": Quality(
        max_kl=2e-2,
        min_top_1=0.93,
        max_perplexity_increase=1e-2,
        max_logit_error=8e-2,
        reason=(
            "neo-mini on its held-out text: KL 1.8e-3, top-1 97.4 %, perplexity +0.08 %, logits "
            "1.7e-2. Ten times the KL is still a tenth of what 4 bits cost; a checkpoint whose "
            "activation outliers ruin naive int8 is far past it."
        ),
    ),
    "int4": Quality(
        max_kl=1e-1,
        min_top_1=0.8,
        max_perplexity_increase=1e-1,
        max_logit_error=2.5e-1,
        reason=(
            "neo-mini on its held-out text, round to nearest, blocks of 64: KL 3.8e-2, top-1 "
            "88.6 %, perplexity +3.4 %, logits 8.3e-2; larger models lose less. Two to three "
            "times that."
        ),
    ),
    "int8-cache": Quality(
        max_kl=2e-3,
        min_top_1=0.98,
        max_perplexity_increase=5e-3,
        max_logit_error=3e-2,
        reason=(
            "Float weights with keys and values in int8. neo-mini: KL 1.7e-4, top-1 99.2 %, "
            "perplexity +0.004 %, logits 5.7e-3."
        ),
    ),
}


def quality_of(manifest: Manifest) -> Quality:
    """What is asked of a bundle: of a mixed one what int4 is asked for."""
    if manifest.cache.dtype == "int8" and not is_quantized(manifest.precision):
        return QUALITY["int8-cache"]
    return QUALITY.get(manifest.precision, QUALITY["int4"])
