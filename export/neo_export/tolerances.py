"""How far a bundle may be off from PyTorch, in one table, with the reason for each figure.

"Relative L2" of a position is ‖logits − reference‖ / ‖reference‖ over the vocabulary; the worst
position counts. The reference is transformers' GPT-Neo, `attn_implementation="eager"`, float32.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TOLERANCES", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """Limits for one precision."""

    logits: float
    """Worst relative L2 error of a position's logits."""
    hidden: float
    """Worst relative L2 error of a position's hidden state, at any place of any layer."""
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(
        logits=1e-5,
        hidden=1e-4,
        reason=(
            "Only the order of float32 sums differs: 2⁻²⁴ a rounding, about √K of them a product "
            "of K terms. A single place (a small attention output) may be off by more than the "
            "logits, which average over it."
        ),
    ),
    "fp16": Tolerance(
        logits=5e-3,
        hidden=2e-2,
        reason="Weights and activations carry 11 bits (2⁻¹¹ = 5e-4 a rounding), layer upon layer.",
    ),
}
