"""Limits for the difference of two bundles' hidden states, with the errors of all earlier layers.

Comparing two bundles cannot tell whether a step or its inputs were wrong: `ACCUMULATED` allows all
errors of the coarser storage, the rounding of its weights included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.bundle.manifest import is_quantized

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Manifest

__all__ = ["ACCUMULATED", "AccumulatedLimits", "accumulated_name"]


@dataclass(frozen=True, kw_only=True)
class AccumulatedLimits:
    """Relative L2 error of a place's hidden states: the coarser bundle against the other."""

    worst: float
    """For the worst position."""
    median: float
    """For the median over the positions of a region."""
    reason: str


_PARITY = "Both compute the same model: the limits of parity on a checkpoint that amplifies."
ACCUMULATED: dict[str, AccumulatedLimits] = {
    "fp32": AccumulatedLimits(worst=1e-4, median=1e-4, reason=_PARITY),
    "fp16": AccumulatedLimits(
        worst=1e-1,
        median=6e-2,
        reason=f"{_PARITY} PyTorch's float16 at the 1.3B shape: 5.4e-2, median 3.0e-2.",
    ),
    "bf16": AccumulatedLimits(
        worst=7e-1,
        median=4e-1,
        reason=f"{_PARITY} PyTorch's bfloat16 at the 1.3B shape: 3.5e-1, median 2.1e-1.",
    ),
    "int8-cache": AccumulatedLimits(
        worst=2e-1, median=8e-2, reason="neo-mini: 6.8e-2, median 2.4e-2. Three times that."
    ),
    "int8": AccumulatedLimits(
        worst=4e-1, median=1.5e-1, reason="neo-mini: 1.2e-1, median 4.7e-2. Three times that."
    ),
    "fp8": AccumulatedLimits(
        worst=6e-1,
        median=3e-1,
        reason="Between int8 and int4, as its bits are: 4, of weights and of activations.",
    ),
    "int4": AccumulatedLimits(
        worst=9e-1,
        median=5e-1,
        reason=(
            "neo-mini, blocks of 64: 4.8e-1, median 1.9e-1; of 32: 3.6e-1 and 1.7e-1. A wrong "
            "matrix gives more than 1, a window off by one 1.2 and more."
        ),
    ),
}
ACCUMULATED["mixed"] = ACCUMULATED["int4"]


def accumulated_name(manifest: Manifest) -> str:
    """The key of `ACCUMULATED` that applies to a bundle."""
    if is_quantized(manifest.precision) or manifest.cache.dtype != "int8":
        return manifest.precision
    return "int8-cache"
