"""The places of a model in the order of computation, and the regions of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

__all__ = [
    "CACHED",
    "EXACT",
    "LAYER_PLACES",
    "REGIONS",
    "Place",
    "all_places",
    "place_text",
    "region_masks",
]

Place = tuple[int | None, str]
"""Layer (None around them) and name."""

CACHED = {"cached_key": "key", "cached_value": "value"}
"""What a graph left in its cache → the place that it is a copy of."""
LAYER_PLACES = (
    "query",
    "key",
    "value",
    "cached_key",
    "cached_value",
    "attended",
    "attention",
    "mlp",
    "residual",
)
EXACT = frozenset({"cached_key", "cached_value", "attended", "residual", "final_norm"})
"""Places that no stored weight matrix leads to: computed in the activations' own arithmetic, so
that even a quantized bundle agrees closely."""
REGIONS = ("below", "at", "past")
"""Positions whose local layers see less than a window; the first that sees a whole one; the rest,
for which a local layer has to leave something out."""


def all_places(spec: ModelSpec) -> tuple[Place, ...]:
    """Every place, in the order of computation."""
    inner = [(layer, place) for layer in range(spec.num_layers) for place in LAYER_PLACES]
    return ((None, "embedding"), *inner, (None, "final_norm"), (None, "logits"))


def place_text(layer: int | None, place: str) -> str:
    """For messages."""
    return place if layer is None else f"{place} of layer {layer}"


def region_masks(positions: NDArray[np.int64], window: int) -> dict[str, NDArray[np.bool_]]:
    """Which positions (counted from 0) lie in which region: bool arrays of their shape."""
    full = window - 1
    return {"below": positions < full, "at": positions == full, "past": positions > full}
