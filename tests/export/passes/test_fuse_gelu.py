from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from helpers.graphs import (
    apply_pass,
    assert_same_outputs,
    bound_graph,
    nodes_of,
    operators,
    situations,
    spec_of,
    through_identity,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.fuse_gelu import fuse_gelu, fuse_gelu_behind_bias

if TYPE_CHECKING:
    from neo_export.passes import Pass

CONFIG = TinyConfig()
LAYERS = len(CONFIG.attention_layers)


@pytest.mark.parametrize(("rewrite", "inputs"), [(fuse_gelu, 2), (fuse_gelu_behind_bias, 1)])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_with_fewer_operators(name: str, rewrite: Pass, inputs: int) -> None:
    before, after = bound_graph(name, CONFIG), bound_graph(name, CONFIG)
    assert apply_pass(rewrite, after) == LAYERS
    found, was = operators(after), operators(before)
    assert found["FastGelu"] == LAYERS
    assert {len(node.inputs) for node in nodes_of(after, "FastGelu")} == {inputs}
    assert found["Tanh"] == 0
    # The bias, x + 0.044715 x³, 1 + tanh.
    assert was["Add"] - found["Add"] == (1 + inputs) * LAYERS
    assert len(before.graph) - len(after.graph) == (7 + inputs) * LAYERS
    assert_same_outputs(before, after, situations(name, CONFIG), 2e-6)


def test_places_keep_their_names() -> None:
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    apply_pass(fuse_gelu, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


@pytest.mark.parametrize("constant", [0.044715, math.sqrt(2 / math.pi), 0.5, 1.0])
def test_must_not_fire_on_another_activation(constant: float) -> None:
    model = bound_graph("score", CONFIG)
    near_tanh = {
        value
        for node in model.graph
        for value in node.inputs
        if value is not None
        and value.is_initializer()
        and value.const_value is not None
        and not value.shape  # a scalar: the parameters are not read
        and math.isclose(float(value.const_value.numpy()), constant, rel_tol=1e-6)
    }
    assert near_tanh
    for value in near_tanh:
        value.const_value = ir.tensor(np.float32(constant * 1.01), name=value.name)
    assert fuse_gelu(model) == 0


def test_must_not_fire_where_the_bias_is_computed() -> None:
    model = bound_graph("score", CONFIG)
    first = next(
        node
        for node in nodes_of(model, "Add")
        if any(v is not None and v.name == "transformer.h.0.mlp.c_fc.bias" for v in node.inputs)
    )
    through_identity(model, first, 1)
    assert fuse_gelu(model) == LAYERS - 1
    assert operators(model)["Tanh"] == 1


def test_must_not_fire_where_the_bias_is_a_matrix() -> None:
    """FastGelu takes a vector."""
    model = bound_graph("score", CONFIG)
    bias = model.graph.initializers["transformer.h.0.mlp.c_fc.bias"]
    bias.shape = ir.Shape([1, 4 * CONFIG.hidden_size])
    assert fuse_gelu(model) == LAYERS - 1


def test_must_not_fire_where_a_step_is_read_elsewhere() -> None:
    """The sum under the activation would be gone."""
    model = bound_graph("score", CONFIG)
    tanh = nodes_of(model, "Tanh")[0]
    model.graph.outputs.append(tanh.outputs[0])
    tanh.outputs[0].name = "kept"
    before = [node.op_type for node in model.graph]
    assert fuse_gelu(model) == LAYERS - 1
    assert "Tanh" in before
    assert operators(model)["Tanh"] == 1
