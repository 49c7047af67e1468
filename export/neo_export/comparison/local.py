"""The expected result of each step of a layer on the bundle's own inputs of that step.

Errors accumulate from layer to layer, so an error at a place says little about where it arose. So
PyTorch also computes each step of each layer from the bundle's *own* inputs of that step:

    query, key, value   from the hidden state that entered the layer
    attended            from the bundle's own query, key and value
    attention           from its own attended
    mlp                 from its own hidden state and attention
    residual            the sum of its own hidden state, attention and mlp

A fault then shows only at its own place, whatever the errors before it. If a graph does not show
`query` or `attended`, the attention is computed from the hidden state in one step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_export.quantize.kv_cache import stored_cache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_export.comparison.reference import LayeredReference, ReferenceLayer
    from neo_export.comparison.trace import Trace
    from neo_export.quantize.kv_cache import CacheSteps

__all__ = ["entering", "expected_embedding", "expected_in_layer"]


def expected_embedding(
    reference: LayeredReference, trace: Trace, ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The embedding at the trace's positions, [length, H]; `ids` are those of the whole text."""
    positions = trace.positions
    return reference.embed(ids[positions], positions)


def entering(trace: Trace, layer: int) -> NDArray[np.float32]:
    """The bundle's own hidden state that enters a layer, [length, H]."""
    return trace.get(*_before(layer))


def expected_in_layer(
    layer: ReferenceLayer, index: int, trace: Trace, cache: CacheSteps | None = None
) -> dict[str, NDArray[np.float32]]:
    """Place → expected values [length, H], each from the bundle's own inputs of that step."""
    hidden = entering(trace, index)
    expected = layer.project(hidden)
    query, attended = (trace.has(index, place) for place in ("query", "attended"))
    if query and attended:
        key, value = (trace.with_history(index, place) for place in ("key", "value"))
        if cache is not None:
            key = stored_cache(key, cache.key[index])
            value = stored_cache(value, cache.value[index])
        expected["attended"] = layer.attend(trace.get(index, "query"), key, value)
        expected["attention"] = layer.project_out(trace.get(index, "attended"))
    else:
        past = layer.project(trace.with_history(*_before(index)))
        mixed = layer.attend(expected["query"], past["key"], past["value"])
        expected["attention"] = layer.project_out(mixed)
        if not query:
            del expected["query"]
    behind = hidden + trace.get(index, "attention")
    expected["mlp"] = layer.mlp(behind)
    expected["residual"] = np.add(behind, trace.get(index, "mlp"), dtype=np.float32)
    return expected


def _before(layer: int) -> tuple[int | None, str]:
    return (None, "embedding") if layer == 0 else (layer - 1, "residual")
