"""Bundle against bundle: the first place whose accumulated error says that something is wrong."""

from __future__ import annotations

import numpy as np
from helpers.graphs import spec_of
from helpers.models import TinyConfig
from neo_export.comparison.errors import PlaceErrors, Series
from neo_export.comparison.jumps import find_jumps
from neo_export.comparison.places import Place, all_places
from neo_export.tolerances import TOLERANCES

SPEC = spec_of(TinyConfig())
HALF = ("fp16", "fp32")
LIMIT = TOLERANCES["fp16"].any_checkpoint


def errors(usual: float, **places: float) -> PlaceErrors:
    """The same error everywhere but at these places of layer 1."""
    found = PlaceErrors()
    for layer, place in all_places(SPEC):
        value = places.get(place, usual) if layer == 1 else usual
        series = np.full(20, value)
        found.add("score", (layer, place), Series(np.arange(20), series, series))
    return found


def named(found: PlaceErrors, precisions: tuple[str, str] = HALF) -> list[Place]:
    return [(fault.layer, fault.place) for fault in find_jumps(found, SPEC, precisions)]


def test_what_rounding_gives_is_no_fault() -> None:
    assert named(errors(LIMIT / 2)) == []
    assert named(errors(1e-6), ("fp32", "fp32")) == []


def test_what_attention_gives_may_be_further_off() -> None:
    assert named(errors(LIMIT / 2, attended=1.5 * LIMIT, attention=1.5 * LIMIT)) == []
    assert named(errors(LIMIT / 2, mlp=1.5 * LIMIT)) == [(1, "mlp")]
    attention = TOLERANCES["fp16"].any_attention
    assert attention is not None
    assert named(errors(LIMIT / 2, attended=1.1 * attention)) == [(1, "attended")]


def test_far_past_all_before_is_a_fault_within_the_limit() -> None:
    assert named(errors(1e-3, mlp=LIMIT / 2)) == [(1, "mlp")]


def test_the_coarser_precision_decides() -> None:
    found = errors(LIMIT)
    assert named(found, ("fp32", "fp32"))[0] == (None, "embedding")
    assert named(found, ("fp32", "bf16")) == named(found, ("int4", "fp32")) == []
