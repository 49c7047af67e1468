"""Errors of every place at every position: the step's local error, and the accumulated one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from neo_export.comparison.local import expected_embedding, expected_in_layer
from neo_export.comparison.metrics import logit_error, relative_l2
from neo_export.comparison.places import all_places

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from neo_export.comparison.held_weights import HeldWeights
    from neo_export.comparison.places import Place
    from neo_export.comparison.reference import LayeredReference
    from neo_export.comparison.trace import Text, Trace
    from neo_export.quantize.kv_cache import CacheSteps

__all__ = ["PlaceErrors", "Series", "measure", "measure_logits"]


@dataclass(frozen=True)
class Series:
    """Relative L2 errors of one place of one graph at the positions of all texts, [n] each."""

    positions: NDArray[np.int64]
    local: NDArray[np.float64]
    """Error of this step alone: the reference computes it from the bundle's own inputs."""
    cumulative: NDArray[np.float64]
    """Error against the reference's own run, which starts from the tokens."""


@dataclass
class PlaceErrors:
    """Series by graph and place; those of several texts are concatenated."""

    parts: dict[tuple[str, Place], list[Series]] = field(default_factory=dict)
    held: set[tuple[str, Place]] = field(default_factory=set)
    """Graphs and places whose local error was computed with exactly the graph's own weights."""

    def add(self, graph: str, place: Place, series: Series) -> None:
        """Append the errors of one text."""
        self.parts.setdefault((graph, place), []).append(series)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs that were compared."""
        return tuple(dict.fromkeys(graph for graph, _ in self.parts))

    def series(self, graph: str, place: Place) -> Series | None:
        """The errors of one place; None if this graph does not show it."""
        parts = self.parts.get((graph, place))
        if not parts:
            return None
        return Series(
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.local for part in parts]),
            np.concatenate([part.cumulative for part in parts]),
        )


def measure(
    reference: LayeredReference,
    texts: Sequence[Text],
    progress: Callable[[int, int], None] | None = None,
    cache: CacheSteps | None = None,
    held: Mapping[str, HeldWeights] | None = None,
) -> tuple[PlaceErrors, list[NDArray[np.float32]]]:
    """Run the reference over all texts, a layer at a time, and compare at every place.

    Args:
        reference: the reference, float32.
        texts: texts with the bundle's traces; a text without traces is run, but not compared.
        progress: called with the number of layers done and the total.
        cache: the steps of the bundle's int8 cache. The attention step for local errors uses keys
            and values that are rounded to them; the reference's own run does not.
        held: the weights of a quantized bundle by graph, for local errors.

    Returns:
        The errors, and the reference's hidden states after the final norm, [S, H] for each text.
    """
    errors = PlaceErrors()
    held = held or {}
    own_models = {weights: reference.with_weights(weights) for weights in held.values()}
    hidden = [reference.embed(text.ids) for text in texts]
    for text, state in zip(texts, hidden, strict=True):
        for trace in text.traces:
            local = own_models[held[trace.graph]] if held else reference
            own = {"embedding": expected_embedding(local, trace, text.ids)}
            _compare(errors, trace, None, own, {"embedding": state})
    layers = reference.spec.num_layers
    for index in range(layers):
        layer = reference.layer(index)
        own_layers = {weights: model.layer(index) for weights, model in own_models.items()}
        for number, text in enumerate(texts):
            places = layer.places(hidden[number])
            hidden[number] = places["residual"]
            for trace in text.traces:
                own_layer = own_layers[held[trace.graph]] if held else layer
                own = expected_in_layer(own_layer, index, trace, cache)
                _compare(errors, trace, index, own, places)
                trace.rest()
        if progress is not None:
            progress(index + 1, layers)
    _add_caches(errors, texts)
    finals = [reference.final_norm(state) for state in hidden]
    for text, state in zip(texts, finals, strict=True):
        for trace in text.traces:
            own = {"final_norm": reference.final_norm(trace.get(layers - 1, "residual"))}
            _compare(errors, trace, None, own, {"final_norm": state})
    errors.held = _held_places(reference, held)
    return errors, finals


def _add_caches(errors: PlaceErrors, texts: Sequence[Text]) -> None:
    for text in texts:
        for check in text.cache_checks:
            for place, found in check.errors.items():
                errors.add(check.graph, place, Series(check.positions, found, found))


def _held_places(
    reference: LayeredReference, held: Mapping[str, HeldWeights]
) -> set[tuple[str, Place]]:
    tied, places = reference.spec.tie_word_embeddings, all_places(reference.spec)
    return {
        (graph, place)
        for graph, weights in held.items()
        for place in places
        if weights.covers(place, tied=tied)
    }


def measure_logits(
    errors: PlaceErrors, reference: LayeredReference, trace: Trace, expected: NDArray[np.float32]
) -> None:
    """Compare a trace's logits with the head on its own last hidden state, and with `expected`.

    Args:
        errors: the errors to add to.
        reference: the reference with the head.
        trace: a trace with logits.
        expected: the reference's own logits at the same positions, [rows, V].
    """
    assert trace.logits is not None
    assert trace.logits_at is not None
    final = trace.get(None, "final_norm")[trace.logits_at - trace.start]
    local = logit_error(trace.logits, reference.logits(final))
    cumulative = logit_error(trace.logits, expected)
    errors.add(trace.graph, (None, "logits"), Series(trace.logits_at, local, cumulative))


def _compare(
    errors: PlaceErrors,
    trace: Trace,
    layer: int | None,
    own: Mapping[str, NDArray[np.float32]],
    places: Mapping[str, NDArray[np.float32]],
) -> None:
    for place, expected in own.items():
        rows = trace.rows(layer, place)
        positions = trace.positions[rows]
        found = trace.get(layer, place)[rows]
        local, path = relative_l2(found, expected[rows]), places[place][positions]
        series = Series(positions, local, relative_l2(found, path))
        errors.add(trace.graph, (layer, place), series)
