"""What it computes, mask by mask, is the subject of test_mask_guard.py and test_parity.py."""

from __future__ import annotations

import pytest
from helpers.graphs import (
    apply_pass,
    assert_same_outputs,
    bound_graph,
    nodes_of,
    operators,
    situations,
    spec_of,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.gpt_neo.model import WINDOW_KEY
from neo_export.passes.fuse_attention import GUARD_NODE, fuse_attention

CONFIG = TinyConfig(attention_layers=("local", "global", "local"))
LAYERS = len(CONFIG.attention_layers)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_with_fewer_operators(name: str) -> None:
    before, after = bound_graph(name, CONFIG), bound_graph(name, CONFIG)
    assert apply_pass(fuse_attention, after) == LAYERS
    found, was = operators(after), operators(before)
    assert found["GroupQueryAttention"] == was["Softmax"] == LAYERS
    assert found["Softmax"] == 0
    assert was["MatMul"] - found["MatMul"] == 2 * LAYERS
    assert_same_outputs(before, after, situations(name, CONFIG), 5e-6)


def test_places_keep_their_names() -> None:
    before, after = bound_graph("score", CONFIG), bound_graph("score", CONFIG)
    apply_pass(fuse_attention, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_each_layer_has_its_window_and_no_scale() -> None:
    model = bound_graph("decode", CONFIG)
    apply_pass(fuse_attention, model)
    nodes = nodes_of(model, "GroupQueryAttention")
    windows = [node.attributes.get_int("local_window_size") for node in nodes]
    assert windows == [CONFIG.window_size, -1, CONFIG.window_size]
    for node in nodes:
        assert node.attributes.get_float("scale") == 1.0
        assert node.attributes.get_int("do_rotary") == 0
        assert node.attributes.get_int("num_heads") == CONFIG.num_heads
        assert node.attributes.get_int("kv_num_heads") == CONFIG.num_heads


def test_lengths_are_derived_once_behind_one_guard() -> None:
    model = bound_graph("decode", CONFIG)
    apply_pass(fuse_attention, model)
    assert sum(node.name == GUARD_NODE for node in model.graph) == 1
    nodes = nodes_of(model, "GroupQueryAttention")
    assert len({(node.inputs[5], node.inputs[6]) for node in nodes}) == 1


@pytest.mark.parametrize("head_dim", [4, 12, 20])
def test_must_not_fire_where_the_head_size_is_no_multiple_of_8(head_dim: int) -> None:
    config = TinyConfig(head_dim=head_dim)
    model = bound_graph("score", config)
    before = list(model.graph)
    assert fuse_attention(model) == 0
    assert list(model.graph) == before, "not even the guard is put in"


@pytest.mark.parametrize("head_dim", [8, 40, 80])
def test_fires_where_the_head_size_is_a_multiple_of_8(head_dim: int) -> None:
    config = TinyConfig(head_dim=head_dim)
    assert fuse_attention(bound_graph("score", config)) == len(config.attention_layers)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_must_not_fire_on_a_foreign_mask(layer: int) -> None:
    model = bound_graph("score", CONFIG)
    where = nodes_of(model, "Where")[layer]
    mask = where.inputs[0]
    assert mask is not None
    del mask.metadata_props[WINDOW_KEY]
    same = sum(node.inputs[0] is mask for node in nodes_of(model, "Where"))
    assert apply_pass(fuse_attention, model) == LAYERS - same
    assert operators(model)["Softmax"] == same


def test_must_not_fire_on_scaled_scores() -> None:
    """Another model's attention: it has a step that the operator's scale of 1 would drop."""
    import onnx_ir as ir

    model = bound_graph("score", CONFIG)
    where = nodes_of(model, "Where")[0]
    scores = where.inputs[1]
    assert scores is not None
    scaled = ir.node("Mul", [scores, scores])
    model.graph.insert_before(where, scaled)
    where.replace_input_with(1, scaled.outputs[0])
    assert apply_pass(fuse_attention, model) == LAYERS - 1
