from __future__ import annotations

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
    value_named,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm

CONFIG = TinyConfig(layer_norm_epsilon=1e-2)
"""An epsilon that shows where it is lost."""
NORMS = 2 * len(CONFIG.attention_layers) + 1


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_with_fewer_operators(name: str) -> None:
    before, after = bound_graph(name, CONFIG), bound_graph(name, CONFIG)
    assert apply_pass(fuse_skip_layer_norm, after) == NORMS
    found, was = operators(after), operators(before)
    assert found["SkipLayerNormalization"] == was["LayerNormalization"] == NORMS
    assert found["LayerNormalization"] == 0
    assert was["Add"] - found["Add"] == NORMS
    assert_same_outputs(before, after, situations(name, CONFIG), 2e-6)


def test_places_keep_their_names() -> None:
    """The residual stream is an output of the fused operator, under its old name."""
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    apply_pass(fuse_skip_layer_norm, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))
    node = value_named(after, "transformer.h.0.residual").producer()
    assert node is not None
    assert node.op_type == "SkipLayerNormalization"
    assert node.attributes.get_float("epsilon") == pytest.approx(CONFIG.layer_norm_epsilon)


def _addend(model: ir.Model, shape: ir.Shape) -> None:
    """Let the token embeddings, an addend of the first norm, come in this shape."""
    first = nodes_of(model, "LayerNormalization")[0].inputs[0]
    assert first is not None
    add = first.producer()
    assert add is not None
    through_identity(model, add, 0)
    value = add.inputs[0]
    assert value is not None
    value.shape = shape


@pytest.mark.parametrize(
    "shape",
    [
        (CONFIG.hidden_size,),
        ("sequence", CONFIG.hidden_size),
        (1, "sequence", CONFIG.hidden_size),
        ("batch", 1, CONFIG.hidden_size),
        ("batch", "sequence", 1),
    ],
)
def test_must_not_fire_where_an_addend_broadcasts(shape: tuple[int | str, ...]) -> None:
    model = bound_graph("score", CONFIG)
    _addend(model, ir.Shape(shape))
    assert fuse_skip_layer_norm(model) == NORMS - 1
    assert operators(model)["LayerNormalization"] == 1


def test_must_not_fire_where_an_addend_is_stored() -> None:
    model = bound_graph("score", CONFIG)
    _addend(model, ir.Shape(["batch", "sequence", CONFIG.hidden_size]))
    add = nodes_of(model, "Add")[0]
    stored = ir.Value(
        name="stored",
        shape=ir.Shape([1, 1, CONFIG.hidden_size]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    model.graph.initializers["stored"] = stored
    norm = nodes_of(model, "LayerNormalization")[0].inputs[0]
    assert norm is not None
    add = norm.producer()
    assert add is not None
    add.replace_input_with(0, stored)
    assert fuse_skip_layer_norm(model) == NORMS - 1


def test_must_not_fire_where_the_shape_is_unknown() -> None:
    model = bound_graph("score", CONFIG)
    _addend(model, ir.Shape(["batch", "sequence", CONFIG.hidden_size]))
    norm = nodes_of(model, "LayerNormalization")[0].inputs[0]
    assert norm is not None
    add = norm.producer()
    assert add is not None
    assert add.inputs[0] is not None
    add.inputs[0].shape = None
    assert fuse_skip_layer_norm(model) == NORMS - 1


def test_must_not_fire_where_another_axis_is_normalized() -> None:
    model = bound_graph("score", CONFIG)
    node = nodes_of(model, "LayerNormalization")[0]
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert fuse_skip_layer_norm(model) == NORMS - 1
