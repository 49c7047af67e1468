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
"""Layer (None for places outside the layers) and name."""

CACHED = {"cached_key": "key", "cached_value": "value"}
"""Place of the cache's content → the place that it is a copy of."""
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
"""Places that are not the output of a stored weight matrix: they are computed in the activations'
precision, so even a quantized bundle agrees closely."""
REGIONS = ("below", "at", "past")
"""Positions whose local layers see less than a window; the first position that sees a whole window;
and the rest, for which a local layer masks earlier positions."""


def all_places(spec: ModelSpec) -> tuple[Place, ...]:
    """Every place, in the order of computation."""
    inner = [(layer, place) for layer in range(spec.num_layers) for place in LAYER_PLACES]
    return ((None, "embedding"), *inner, (None, "final_norm"), (None, "logits"))


def place_text(layer: int | None, place: str) -> str:
    """The place's name in messages."""
    return place if layer is None else f"{place} of layer {layer}"


def region_masks(positions: NDArray[np.int64], window: int) -> dict[str, NDArray[np.bool_]]:
    """Masks of the positions (counted from 0) in each region: bool arrays of their shape."""
    full = window - 1
    return {"below": positions < full, "at": positions == full, "past": positions > full}
