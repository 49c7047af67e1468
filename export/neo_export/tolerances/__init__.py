"""Every limit of the project's comparisons, each with its reason.

TOLERANCES  a bundle against PyTorch on the weights that it stores: tests, `neo-export --verify`
LOCAL       one step of one layer, from the bundle's own inputs: is it a fault?
QUALITY     logits against PyTorch on the checkpoint's own weights: may the bundle ship?
"""

from neo_export.tolerances.local import HALVES, LOCAL, LocalLimits, limits_name
from neo_export.tolerances.parity import TOLERANCES, Tolerance, tolerance_name
from neo_export.tolerances.quality import QUALITY, Quality, quality_of

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
