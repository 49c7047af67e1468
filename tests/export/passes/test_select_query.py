from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from helpers.cache_steps import random_steps
from helpers.graphs import (
    ALIKE,
    apply_pass,
    bound_graph,
    nodes_of,
    passes_of,
    situations,
    spec_of,
    through_identity,
    value_named,
)
from helpers.models import TinyConfig
from helpers.running import run_model
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.quantize_cache import quantize_cache_steps
from neo_export.passes.select_query import select_query

CONFIG = TinyConfig()
LAYERS = len(CONFIG.attention_layers)
LAST = f"transformer.h.{LAYERS - 1}"


def fused(name: str = "prefill") -> ir.Model:
    """The graph that the pass works on."""
    model = bound_graph(name, CONFIG)
    assert apply_pass(fuse_attention, model) == LAYERS
    return model


def ragged() -> dict[str, Any]:
    """First prompts of several lengths: the chosen positions differ from row to row."""
    inputs = situations("prefill", CONFIG)[0]
    lengths = np.array([[inputs["input_ids"].shape[1]], [2]])
    inputs["attention_mask"] = (np.arange(lengths.max()) < lengths).astype(np.int64)
    return inputs


@pytest.mark.parametrize("inputs", [*situations("prefill", CONFIG), ragged()])
def test_outputs_are_the_same(inputs: dict[str, Any]) -> None:
    before, after = fused(), fused()
    assert apply_pass(select_query, after) == 1
    valid = inputs["attention_mask"].sum(axis=1)
    expected, found = run_model(before, inputs), run_model(after, inputs)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found.pop("logits"), expected.pop("logits"), rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        for row, length in enumerate(valid):
            ours, theirs = found[name][row, :, :length], value[row, :, :length]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)


def test_queries_are_those_of_the_last_position() -> None:
    model = fused()
    apply_pass(select_query, model)
    query = value_named(model, f"{LAST}.query")
    model.graph.outputs.append(query)
    query.type = ir.TensorType(ir.DataType.FLOAT)
    whole = fused()
    expected = value_named(whole, f"{LAST}.query")
    whole.graph.outputs.append(expected)
    expected.type = ir.TensorType(ir.DataType.FLOAT)
    inputs = ragged()
    found, theirs = (run_model(m, inputs)[f"{LAST}.query"] for m in (model, whole))
    assert found.shape == (2, 1, CONFIG.hidden_size)
    at = inputs["attention_mask"].sum(axis=1) - 1
    np.testing.assert_allclose(found[:, 0], theirs[np.arange(2), at], rtol=1e-5, atol=1e-6)


def test_places_keep_their_names() -> None:
    before, after = fused(), fused()
    apply_pass(select_query, after)
    spec = spec_of(CONFIG)
    assert probes_of(after, spec) == probes_of(before, spec)
    # What tools compare is computed: the rows that the layer goes on with.
    for place in ("query", "attended"):
        shape = value_named(after, f"{LAST}.{place}").shape
        assert shape is not None
        assert shape[1] == 1


@pytest.mark.parametrize("name", [name for name in GRAPH_NAMES if name != "prefill"])
def test_must_not_fire_where_every_position_goes_on(name: str) -> None:
    model = fused(name)
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_on_one_product_for_three() -> None:
    model = fused()
    apply_pass(pack_qkv(ALIKE), model)
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_where_more_is_read() -> None:
    model = fused()
    attended = nodes_of(model, "GroupQueryAttention")[-1].outputs[0]
    copy = ir.node("Identity", [attended])
    copy.outputs[0].name, copy.outputs[0].type = "all", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(copy)
    model.graph.outputs.append(copy.outputs[0])
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_where_the_queries_are_read_elsewhere() -> None:
    model = fused()
    query = nodes_of(model, "GroupQueryAttention")[-1].inputs[0]
    assert query is not None
    model.graph.append(ir.node("Identity", [query]))
    assert apply_pass(select_query, model) == 0
    model = fused()
    query = nodes_of(model, "GroupQueryAttention")[-1].inputs[0]
    assert query is not None
    query.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(query)
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_where_what_is_attended_to_is_an_output() -> None:
    model = fused()
    attended = nodes_of(model, "GroupQueryAttention")[-1].outputs[0]
    attended.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(attended)
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_for_several_positions_a_row() -> None:
    model = fused()
    [choice] = [use.node for use in nodes_of(model, "GroupQueryAttention")[-1].outputs[0].uses()]
    choice.outputs[0].shape = ir.Shape(["batch", 3, CONFIG.hidden_size])
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_on_a_choice_across_rows() -> None:
    model = fused()
    [choice] = [use.node for use in nodes_of(model, "GroupQueryAttention")[-1].outputs[0].uses()]
    choice.attributes["batch_dims"] = ir.AttrInt64("batch_dims", 0)
    assert apply_pass(select_query, model) == 0


def test_must_not_fire_on_queries_of_another_operator() -> None:
    """What it reads may mix positions."""
    model = fused()
    through_identity(model, nodes_of(model, "GroupQueryAttention")[-1], 0)
    assert apply_pass(select_query, model) == 0


@pytest.mark.parametrize("inputs", [situations("prefill", CONFIG)[0], ragged()])
def test_with_a_cache_in_int8(inputs: dict[str, Any]) -> None:
    """Its pass packs what it finds, the repeated queries too."""
    integers = {k: v.astype(np.int8) if v.ndim == 4 else v for k, v in inputs.items()}
    quantize_cache = quantize_cache_steps(random_steps(CONFIG), single=False)
    found = []
    for rewrites in ((quantize_cache,), (select_query, quantize_cache)):
        model = fused()
        for rewrite in rewrites:
            assert apply_pass(rewrite, model) > 0
        found.append(run_model(model, integers)["logits"])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_as_shipped_on_a_cpu(precision: str) -> None:
    """The three projections of the last layer are stored apart in all graphs."""
    for name in GRAPH_NAMES:
        model = bound_graph(name, CONFIG)
        for step in passes_of("cpu", precision, name, spec_of(CONFIG)):
            apply_pass(step, model)
        packed = [node.inputs[1] is None for node in nodes_of(model, "GroupQueryAttention")]
        assert packed == [True] * (LAYERS - 1) + [False]
        shape = value_named(model, f"{LAST}.query").shape
        assert shape is not None
        assert (shape[1] == 1) == (name == "prefill")


def test_as_shipped_on_a_gpu() -> None:
    """A kernel more costs more there than it spares."""
    model = bound_graph("prefill", CONFIG)
    for step in passes_of("cuda", "fp16", "prefill", spec_of(CONFIG)):
        apply_pass(step, model)
    assert all(node.inputs[1] is None for node in nodes_of(model, "GroupQueryAttention"))
