from __future__ import annotations

import numpy as np
import onnx_ir as ir
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
from neo_export.passes.half_positions import half_positions

CONFIG = TinyConfig()
TABLE = "transformer.wpe.weight"


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_outputs_are_those_of_the_rounded_table(name: str) -> None:
    parameters = random_parameters(CONFIG)
    parameters[TABLE] = parameters[TABLE].astype(np.float16).astype(np.float32)
    before, after = bound_graph(name, CONFIG, parameters), bound_graph(name, CONFIG)
    assert apply_pass(half_positions, after) == 1
    assert operators(after)["Cast"] == operators(before)["Cast"] + 1
    assert_same_outputs(before, after, situations(name, CONFIG), 1e-6)


def test_the_table_takes_half_the_bytes() -> None:
    model = bound_graph("score", CONFIG)
    apply_pass(half_positions, model)
    read = {str(v.name): v for node in model.graph for v in node.inputs if v is not None}
    assert TABLE not in read
    assert read[f"{TABLE}.float16"].dtype == ir.DataType.FLOAT16
    assert "transformer.wte.weight" in read, "the other table that is gathered from stays"


def test_places_keep_their_names() -> None:
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    apply_pass(half_positions, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_must_not_fire_twice() -> None:
    model = bound_graph("score", CONFIG)
    apply_pass(half_positions, model)
    assert half_positions(model) == 0


def test_positions_beyond_half_precision_stay_as_they_are() -> None:
    parameters = random_parameters(CONFIG)
    parameters[TABLE][2, 3] = 65519
    model = bound_graph("score", CONFIG, parameters)
    assert apply_pass(half_positions, model) == 1
    stored = model.graph.initializers[f"{TABLE}.float16"].const_value
    assert stored is not None
    assert stored.numpy()[2, 3] == 65504
    parameters[TABLE][2, 3] = -65520
    model = bound_graph("score", CONFIG, parameters)
    assert apply_pass(half_positions, model) == 0
    assert f"{TABLE}.float16" not in model.graph.initializers
