"""Default limits of `neo-diff` for a bundle's logits: `QUALITY`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import is_quantized

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["NEAR_TIE", "QUALITY", "Quality", "quality_of"]


@dataclass(frozen=True)
class Quality:
    """Default limits of `neo-diff` for a bundle's logits: may it ship?

    The logits are compared with those of PyTorch in float32 on the checkpoint's own weights, over
    all scored positions.
    """

    max_kl: float
    """Mean KL(reference ‖ bundle), nats."""
    min_top_1: float
    """Share of positions whose best token is the same (`NEAR_TIE`)."""
    max_perplexity_increase: float
    """bundle / reference − 1."""
    max_logit_error: float
    """Median over positions of the relative L2 error of the logits."""
    reason: str


NEAR_TIE = 1e-5
"""Two tokens are equally good if their logits in PyTorch's float32 differ by at most this share of
the position's largest |logit|: the order of summation decides which is the best. It changes logits
by 1e-6 of a row on small checkpoints, and by up to 2e-5 on the 1.3B shape."""

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
    """The default limits for a bundle; a mixed bundle has those of int4."""
    if manifest.cache.dtype == "int8" and not is_quantized(manifest.precision):
        return QUALITY["int8-cache"]
    return QUALITY.get(manifest.precision, QUALITY["int4"])
