"""Bundle against bundle: the first place whose accumulated error says that something is wrong."""

from __future__ import annotations

import numpy as np
from helpers.graphs import spec_of
from helpers.models import TinyConfig
from neo_export.comparison.errors import PlaceErrors, Series
from neo_export.comparison.jumps import find_jumps
from neo_export.comparison.places import Place, all_places
from neo_export.tolerances import ACCUMULATED, TOLERANCES

SPEC = spec_of(TinyConfig())
HALF = ("fp16", "fp32")
LIMITS = ACCUMULATED["fp16"]


def errors(usual: float, positions: int = 20, **places: float) -> PlaceErrors:
    """The same error everywhere, but another at these places of layer 1, at the last positions."""
    found = PlaceErrors()
    for layer, place in all_places(SPEC):
        series = np.full(20, usual)
        if layer == 1 and place in places:
            series[-positions:] = places[place]
        found.add("score", (layer, place), Series(np.arange(20), series, series))
    return found


def named(found: PlaceErrors, names: tuple[str, str] = HALF) -> list[Place]:
    return [(fault.layer, fault.place) for fault in find_jumps(found, SPEC, names)]


def test_every_precision_has_limits() -> None:
    assert ACCUMULATED.keys() == TOLERANCES.keys()


def test_what_rounding_gives_is_no_fault() -> None:
    assert named(errors(LIMITS.median / 2)) == []
    assert named(errors(1e-6), ("fp32", "fp32")) == []


def test_past_the_limit_at_one_position_or_at_most() -> None:
    usual = LIMITS.median / 2
    assert named(errors(usual, mlp=1.1 * LIMITS.median)) == [(1, "mlp")]
    assert named(errors(usual, positions=1, mlp=1.1 * LIMITS.median)) == []
    assert named(errors(usual, positions=1, mlp=1.1 * LIMITS.worst)) == [(1, "mlp")]
    assert named(errors(usual, positions=1, attended=float("nan"))) == [(1, "attended")]


def test_far_past_all_before_is_a_fault_within_the_limit() -> None:
    assert named(errors(1e-3, mlp=LIMITS.median * 0.9)) == [(1, "mlp")]


def test_the_coarser_bundle_decides() -> None:
    found = errors(LIMITS.median)
    assert named(found, ("fp32", "fp32"))[0] == (None, "embedding")
    assert named(found, ("fp32", "bf16")) == named(found, ("int4", "fp32")) == []


def test_the_error_and_the_limit_that_it_passed() -> None:
    usual = LIMITS.median / 2
    for places, error, limit in (
        ({"mlp": 1.1 * LIMITS.median}, 1.1 * LIMITS.median, LIMITS.median),
        ({"mlp": 1.1 * LIMITS.worst}, 1.1 * LIMITS.worst, LIMITS.worst),
    ):
        [fault] = find_jumps(errors(usual, **places), SPEC, HALF)
        assert (fault.error, fault.limit) == (error, limit)
        assert fault.error > fault.limit


def test_the_region_of_a_fault() -> None:
    [fault] = find_jumps(errors(1e-6, positions=12, attended=1.0), SPEC, ("fp32", "fp32"))
    assert (fault.region, fault.regions) == ("past", ("past",))
    [fault] = find_jumps(errors(1e-6, attended=1.0), SPEC, ("fp32", "fp32"))
    assert fault.region == "everywhere"
