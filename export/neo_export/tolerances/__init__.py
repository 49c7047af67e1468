"""The limits of all comparisons in the project, each with its reason.

TOLERANCES   a bundle against PyTorch on the weights that the bundle stores: tests, `--verify`
LOCAL        one step of one layer on the bundle's own inputs: is it a fault?
ACCUMULATED  one bundle against another, with the accumulated errors of all earlier layers
QUALITY      logits against PyTorch on the checkpoint's own weights: may the bundle ship?
"""

from neo_export.tolerances.accumulated import ACCUMULATED, AccumulatedLimits, accumulated_name
from neo_export.tolerances.local import HALVES, LOCAL, LocalLimits, limits_name
from neo_export.tolerances.parity import TOLERANCES, Tolerance, tolerance_name
from neo_export.tolerances.quality import NEAR_TIE, QUALITY, Quality, quality_of

__all__ = [
    "ACCUMULATED",
    "HALVES",
    "LOCAL",
    "NEAR_TIE",
    "QUALITY",
    "TOLERANCES",
    "AccumulatedLimits",
    "LocalLimits",
    "Quality",
    "Tolerance",
    "accumulated_name",
    "limits_name",
    "quality_of",
    "tolerance_name",
]
