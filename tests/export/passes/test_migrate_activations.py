from __future__ import annotations

import numpy as np
import pytest
from helpers.graphs import (
    apply_pass,
    assert_same_outputs,
    bound_graph,
    operators,
    random_parameters,
    situations,
    spec_of,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.migrate_activations import migrate_activations
from neo_export.quantize.migration import Migration

CONFIG = TinyConfig()


def drawn(*places: str, shifted: bool = True) -> Migration:
    generator = np.random.default_rng(0)
    widths = {"gelu": 4 * CONFIG.hidden_size}
    scales = {
        place: np.exp(
            generator.normal(size=widths.get(place.rsplit(".", 1)[1], CONFIG.hidden_size))
        ).astype(np.float32)
        for place in places
    }
    shifts = {
        place: generator.normal(size=len(scale)).astype(np.float32)
        for place, scale in scales.items()
        if shifted and not place.endswith("ln_1")
    }
    return Migration(scales, shifts)


EVERYWHERE = drawn(*(f"transformer.h.0.{kind}" for kind in ("ln_1", "attended", "ln_2", "gelu")))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_outputs_stay_the_same_with_the_weights_that_belong_to_it(name: str) -> None:
    parameters = random_parameters(CONFIG)
    read = EVERYWHERE.reading(parameters.__getitem__)
    before = bound_graph(name, CONFIG, parameters)
    after = bound_graph(name, CONFIG, {parameter: read(parameter) for parameter in parameters})
    assert apply_pass(migrate_activations(EVERYWHERE), after) == 2, "norms divide by themselves"
    added = operators(after) - operators(before)
    assert added == {"Mul": 2, "Sub": 2}
    assert_same_outputs(before, after, situations(name, CONFIG), 1e-5)


def test_without_a_shift_nothing_is_subtracted() -> None:
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    migration = drawn("transformer.h.1.gelu", shifted=False)
    assert apply_pass(migrate_activations(migration), after) == 1
    assert operators(after) - operators(before) == {"Mul": 1}


def test_places_keep_their_names() -> None:
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    apply_pass(migrate_activations(EVERYWHERE), after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


@pytest.mark.parametrize(
    "migration", [Migration(), drawn("transformer.h.0.ln_1"), drawn("transformer.h.7.gelu")]
)
def test_must_not_fire_where_nothing_is_to_be_done(migration: Migration) -> None:
    assert migrate_activations(migration)(bound_graph("score", CONFIG)) == 0


def test_must_not_fire_twice() -> None:
    model = bound_graph("score", CONFIG)
    assert apply_pass(migrate_activations(EVERYWHERE), model) == 2
    assert migrate_activations(EVERYWHERE)(model) == 0
