from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from helpers.graphs import (
    ALIKE,
    apply_pass,
    assert_same_outputs,
    bound_graph,
    nodes_of,
    operators,
    random_parameters,
    situations,
    spec_of,
    through_identity,
    value_named,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.pack_qkv import pack_qkv

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Probe

CONFIG = TinyConfig()
LAYERS = len(CONFIG.attention_layers)
ATTENTION = "transformer.h.0.attn.attention"


def fused(name: str = "score") -> ir.Model:
    """The graph that the pass works on."""
    model = bound_graph(name, CONFIG)
    assert apply_pass(fuse_attention, model) == LAYERS
    return model


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_with_one_product(name: str) -> None:
    before, after = fused(name), fused(name)
    assert apply_pass(pack_qkv(ALIKE), after) == LAYERS
    found, was = operators(after), operators(before)
    assert was["MatMul"] - found["MatMul"] == 2 * LAYERS
    assert found["GroupQueryAttention"] == LAYERS
    assert_same_outputs(before, after, situations(name, CONFIG), 2e-6)


def test_one_layer_apart() -> None:
    """That one alone, whatever else begins with its number."""
    config = TinyConfig(attention_layers=("global",) * 11)
    model = bound_graph("decode", config)
    apply_pass(fuse_attention, model)
    assert apply_pass(pack_qkv(ALIKE, apart=1), model) == 10
    assert [n.inputs[1] is None for n in nodes_of(model, "GroupQueryAttention")] == [
        layer != 1 for layer in range(11)
    ]


def test_attributes_stay() -> None:
    before, after = fused(), fused()
    apply_pass(pack_qkv(ALIKE), after)
    for old, new in zip(
        nodes_of(before, "GroupQueryAttention"), nodes_of(after, "GroupQueryAttention"), strict=True
    ):
        assert {k: a.value for k, a in new.attributes.items()} == {
            k: a.value for k, a in old.attributes.items()
        }


def test_weights_lie_one_below_the_other() -> None:
    model = fused()
    apply_pass(pack_qkv(ALIKE), model)
    packed = model.graph.initializers[f"{ATTENTION}.qkv_proj.weight"].const_value
    assert packed is not None
    parameters = random_parameters(CONFIG)
    parts = [parameters[f"{ATTENTION}.{part}_proj.weight"] for part in "qkv"]
    assert np.array_equal(packed.numpy(), np.concatenate(parts))


def test_projections_become_channels() -> None:
    before, after = fused(), fused()
    apply_pass(pack_qkv(ALIKE), after)
    old, new = (probes_of(model, spec_of(CONFIG)) for model in (before, after))
    assert [(p.layer, p.place) for p in new] == [(p.layer, p.place) for p in old]

    def projections(probes: tuple[Probe, ...]) -> list[Probe]:
        return [p for p in probes if p.place in ("query", "key", "value")]

    size = CONFIG.hidden_size
    assert [p for p in new if p.channels is None] == [
        p for p in old if p.place not in ("query", "key", "value")
    ]
    assert [p.channels for p in projections(new)] == [
        (0, size),
        (size, 2 * size),
        (2 * size, 3 * size),
    ] * LAYERS
    assert {p.value for p in projections(new)} == {
        f"transformer.h.{layer}.qkv" for layer in range(LAYERS)
    }


@pytest.mark.parametrize("index", [0, 1, 2])
def test_must_not_fire_on_different_inputs(index: int) -> None:
    """Queries of one value and keys of another (cross attention) are not one product."""
    model = fused()
    attention = nodes_of(model, "GroupQueryAttention")[0]
    projection = attention.inputs[index]
    assert projection is not None
    product = projection.producer()
    assert product is not None
    product.replace_input_with(0, value_named(model, "transformer.embedding"))
    assert apply_pass(pack_qkv(ALIKE), model) == LAYERS - 1
    assert attention in list(model.graph)


def test_must_not_fire_on_a_computed_weight() -> None:
    model = fused()
    turn = next(
        node
        for node in nodes_of(model, "Transpose")
        if any(v is not None and v.name == f"{ATTENTION}.v_proj.weight" for v in node.inputs)
    )
    through_identity(model, turn, 0)
    assert apply_pass(pack_qkv(ALIKE), model) == LAYERS - 1


@pytest.mark.parametrize("part", "qkv")
def test_must_not_fire_on_different_shapes(part: str) -> None:
    """Fewer key heads than query heads would make other channels."""
    model = fused()
    weight = model.graph.initializers[f"{ATTENTION}.{part}_proj.weight"]
    weight.shape = ir.Shape([CONFIG.hidden_size // 2, CONFIG.hidden_size])
    assert apply_pass(pack_qkv(ALIKE), model) == LAYERS - 1
