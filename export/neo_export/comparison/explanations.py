"""Explains a fault: computes the usual mistakes, and compares each with the bundle's values.

The wrong step is computed again with another layer's matrix, another window, scaled scores, shifted
positions and so on. If one of these mistakes reproduces the bundle's values, it is named.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from neo_export.comparison.local import entering
from neo_export.comparison.metrics import relative_l2
from neo_export.comparison.places import CACHED, region_masks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from neo_export.comparison.faults import Fault
    from neo_export.comparison.reference import LayeredReference, ReferenceLayer
    from neo_export.comparison.trace import Text, Trace

    Candidate = tuple[str, Callable[[], NDArray[np.float32]]]

__all__ = ["explain"]

_BETTER = 0.35
"""A mistake explains a fault if it leaves at most this share of the fault's error."""
_PROJECTIONS = ("query", "key", "value")


def explain(
    faults: Sequence[Fault], reference: LayeredReference, texts: Sequence[Text]
) -> Fault | None:
    """The first fault, with the mistake that explains it, if a usual one does.

    If query, key and value of a layer are wrong together, but are the three projections of *some*
    common input, then the norm before them is reported instead: place `ln_1`.
    """
    if not faults:
        return None
    first = faults[0]
    found = _trace_of(first, texts)
    if found is None or not np.isfinite(first.error):
        return first
    text, trace = found
    if first.place in CACHED:
        late = any((first.layer, first.place) in check.late for check in text.cache_checks)
        return replace(first, kind="a cache written one position late") if late else first
    if first.layer is None:
        return replace(
            first, kind=_best(first, reference, trace, _around(first, reference, *found))
        )
    layer = reference.layer(first.layer)
    together = {fault.place for fault in faults if fault.layer == first.layer}
    if together.issuperset(_PROJECTIONS) and _is_norm(layer, first.layer, trace):
        return replace(first, place="ln_1", kind=None)
    candidates = _candidates(first, reference, layer, trace)
    return replace(first, kind=_best(first, reference, trace, candidates))


def _trace_of(fault: Fault, texts: Sequence[Text]) -> tuple[Text, Trace] | None:
    """The trace to compare with: of an affected graph, in an affected region."""
    for text in texts:
        for trace in text.traces:
            if trace.graph in fault.graphs and len(_rows(fault, trace, None)):
                return text, trace
    return None


def _rows(fault: Fault, trace: Trace, window: int | None) -> NDArray[np.int64]:
    """Rows of the place in the affected regions; all rows if the window is unknown."""
    rows = trace.rows(fault.layer, fault.place)
    if window is None:
        return rows
    masks = region_masks(trace.positions[rows], window)
    chosen = np.zeros(len(rows), dtype=np.bool_)
    for region in fault.regions:
        chosen |= masks[region]
    return rows[chosen]


def _best(
    fault: Fault,
    reference: LayeredReference,
    trace: Trace,
    candidates: Iterator[Candidate],
) -> str | None:
    rows = _rows(fault, trace, reference.spec.window_size)
    if not len(rows):
        return None
    found = trace.get(fault.layer, fault.place)[rows]
    errors = {}
    for name, compute in candidates:
        errors[name] = float(np.median(relative_l2(found, compute()[rows])))
    if not errors:
        return None
    name = min(errors, key=lambda one: errors[one])
    return name if errors[name] <= max(_BETTER * fault.error, fault.limit) else None


def _around(
    fault: Fault, reference: LayeredReference, text: Text, trace: Trace
) -> Iterator[Candidate]:
    """Candidates for embedding, final norm and head."""
    if fault.place != "embedding":
        return
    positions, last = trace.positions, reference.spec.max_position_embeddings - 1
    ids = text.ids[positions]
    for shift in (1, -1, 2, -2):
        moved = np.clip(positions + shift, 0, last)
        yield (
            f"position rows shifted by {shift:+d}",
            lambda moved=moved: reference.embed(ids, moved),  # type: ignore[misc]
        )
    yield "the first position's row everywhere", lambda: reference.embed(ids, 0 * positions)


def _is_norm(layer: ReferenceLayer, index: int, trace: Trace) -> bool:
    """Whether query, key and value are the projections of one common input, whatever it is.

    They are if their stacked vector is in the column space of the stacked matrices.
    """
    if not all(trace.has(index, place) for place in _PROJECTIONS):
        return False
    stacked = np.concatenate([layer.matrix(f"{place[0]}_proj") for place in _PROJECTIONS])
    rows = trace.rows(index, "query")  # prefill's last layer has fewer of them than keys
    found = np.concatenate([trace.get(index, place)[rows] for place in _PROJECTIONS], axis=1)
    basis, _ = np.linalg.qr(stacked.astype(np.float64))
    inside = (found @ basis) @ basis.T
    return bool(np.median(relative_l2(inside, found)) < _BETTER)


def _candidates(
    fault: Fault, reference: LayeredReference, layer: ReferenceLayer, trace: Trace
) -> Iterator[Candidate]:
    assert fault.layer is not None
    if fault.place in _PROJECTIONS:
        yield from _projections(fault, reference, layer, trace)
    elif fault.place == "attended":
        yield from _attentions(fault.layer, reference, layer, trace)
    elif fault.place == "attention" and trace.has(fault.layer, "attended"):
        yield from _outputs(fault.layer, reference, layer, trace)
    elif fault.place == "mlp":
        yield from _mlps(fault.layer, reference, layer, trace)
    elif fault.place == "residual":
        yield from _sums(fault.layer, trace)


def _projections(
    fault: Fault, reference: LayeredReference, layer: ReferenceLayer, trace: Trace
) -> Iterator[Candidate]:
    assert fault.layer is not None
    x = layer.norm("ln_1", entering(trace, fault.layer))
    own = f"{fault.place[0]}_proj"
    yield f"{own} transposed", lambda: x @ layer.matrix(own)
    for place in _PROJECTIONS:
        name = f"{place[0]}_proj"
        if name != own:
            yield f"{name} in place of {own}", lambda name=name: layer.product(name, x)  # type: ignore[misc]
    hidden = entering(trace, fault.layer)
    for number, other in _others(fault.layer, reference):
        yield f"{own} of layer {number}", lambda other=other: other.product(own, x)  # type: ignore[misc]
        yield (
            f"the weights of layer {number}",
            lambda other=other: other.product(own, other.norm("ln_1", hidden)),  # type: ignore[misc]
        )


def _attentions(
    index: int, reference: LayeredReference, layer: ReferenceLayer, trace: Trace
) -> Iterator[Candidate]:
    spec = reference.spec
    query = trace.get(index, "query")
    key, value = (trace.with_history(index, place) for place in ("key", "value"))
    size = spec.window_size

    def attend(window: int | None = -1, scale: float = 1.0) -> NDArray[np.float32]:
        return layer.attend(query, key, value, window=window, scale=scale)

    yield "scores scaled by 1/√d", lambda: attend(scale=float(spec.head_dim**-0.5))
    if spec.attention_layers[index] == "local":
        yield "a local layer without its window", lambda: attend(window=None)
        for change in (1, -1):
            if size + change > 0:
                yield (
                    f"a window of {size + change} in place of {size}",
                    lambda change=change: attend(window=size + change),  # type: ignore[misc]
                )
    else:
        yield "a global layer with a window", lambda: attend(window=size)

    def late(what: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([what[:1], what[:-1]])

    yield (
        "keys and values one position late",
        lambda: layer.attend(query, late(key), late(value)),
    )


def _outputs(
    index: int, reference: LayeredReference, layer: ReferenceLayer, trace: Trace
) -> Iterator[Candidate]:
    x = trace.get(index, "attended")
    bias = _bias(layer, "out_proj")
    yield "out_proj without its bias", lambda: layer.product("out_proj", x) - bias
    yield "out_proj transposed", lambda: x @ layer.matrix("out_proj") + bias
    for number, other in _others(index, reference):
        yield f"out_proj of layer {number}", _exchanged(layer, other, "out_proj", x)


def _mlps(
    index: int, reference: LayeredReference, layer: ReferenceLayer, trace: Trace
) -> Iterator[Candidate]:
    hidden = entering(trace, index) + trace.get(index, "attention")
    x = layer.norm("ln_2", hidden)
    inner = layer.activation(layer.product("c_fc", x))
    bias = _bias(layer, "c_proj")

    def behind(expanded: NDArray[np.float32]) -> NDArray[np.float32]:
        return layer.product("c_proj", layer.activation(expanded))

    yield "c_proj without its bias", lambda: layer.product("c_proj", inner) - bias
    yield "c_fc without its bias", lambda: behind(layer.product("c_fc", x) - _bias(layer, "c_fc"))
    for number, other in _others(index, reference):
        exchanged = _exchanged(layer, other, "c_fc", x)
        yield f"c_fc of layer {number}", lambda exchanged=exchanged: behind(exchanged())  # type: ignore[misc]
        yield f"c_proj of layer {number}", _exchanged(layer, other, "c_proj", inner)
        yield (
            f"ln_2 of layer {number}",
            lambda other=other: behind(layer.product("c_fc", other.norm("ln_2", hidden))),  # type: ignore[misc]
        )
        yield f"the MLP of layer {number}", lambda other=other: other.mlp(hidden)  # type: ignore[misc]


def _bias(layer: ReferenceLayer, name: str) -> NDArray[np.float32]:
    """The bias of a product, [1, out]: its result for zeros."""
    return layer.product(name, np.zeros((1, layer.matrix(name).shape[1]), dtype=np.float32))


def _exchanged(
    layer: ReferenceLayer, other: ReferenceLayer, name: str, x: NDArray[np.float32]
) -> Callable[[], NDArray[np.float32]]:
    """A function that computes the other layer's matrix with this layer's bias."""
    return lambda: x @ other.matrix(name).T + _bias(layer, name)


def _sums(index: int, trace: Trace) -> Iterator[Candidate]:
    hidden = entering(trace, index)
    attention, mlp = (trace.get(index, place) for place in ("attention", "mlp"))
    yield "a sum without the attention", lambda: hidden + mlp
    yield "a sum without the MLP", lambda: hidden + attention
    yield "a sum without the residual", lambda: attention + mlp


def _others(index: int, reference: LayeredReference) -> Iterator[tuple[int, ReferenceLayer]]:
    """The other layers, one loaded at a time."""
    for other in range(reference.spec.num_layers):
        if other != index:
            yield other, reference.layer(other)
