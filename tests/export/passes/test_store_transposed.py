from __future__ import annotations

import numpy as np
import pytest
from helpers.graphs import (
    apply_pass,
    assert_same_outputs,
    bound_graph,
    nodes_of,
    operators,
    random_parameters,
    situations,
    spec_of,
    through_identity,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.store_transposed import store_transposed

CONFIG = TinyConfig()
LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
PRODUCTS = len(LINEAR) * len(CONFIG.attention_layers)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_without_transposes(name: str) -> None:
    before, after = bound_graph(name, CONFIG), bound_graph(name, CONFIG)
    assert apply_pass(store_transposed, after) == PRODUCTS
    found, was = operators(after), operators(before)
    assert was["Transpose"] - found["Transpose"] == PRODUCTS
    assert found["MatMul"] == was["MatMul"]
    assert_same_outputs(before, after, situations(name, CONFIG), 2e-6)


def test_weights_are_turned_and_named_after_the_checkpoint() -> None:
    model = bound_graph("score", CONFIG)
    apply_pass(store_transposed, model)
    parameters = random_parameters(CONFIG)
    read = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name, expected in parameters.items():
        if any(f".{linear}.weight" in name for linear in LINEAR):
            turned = model.graph.initializers[f"{name}.transposed"].const_value
            assert turned is not None
            assert np.array_equal(turned.numpy(), expected.T)
            assert turned.numpy().flags.c_contiguous
            assert name not in read


def test_places_keep_their_names() -> None:
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    apply_pass(store_transposed, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_must_not_fire_for_a_computed_operand() -> None:
    model = bound_graph("score", CONFIG)
    turn = next(
        node
        for node in nodes_of(model, "Transpose")
        if any(v is not None and v.name == "transformer.h.1.mlp.c_fc.weight" for v in node.inputs)
    )
    through_identity(model, turn, 0)
    assert apply_pass(store_transposed, model) == PRODUCTS - 1
    assert turn in list(model.graph)


def test_the_token_table_is_left_as_it_lies() -> None:
    """The head reads it transposed within its product; a second copy would double the table."""
    model = bound_graph("score", CONFIG)
    apply_pass(store_transposed, model)
    gemm = nodes_of(model, "Gemm")[0]
    assert gemm.inputs[1] is model.graph.initializers["transformer.wte.weight"]
    assert gemm.attributes.get_int("transB") == 1
