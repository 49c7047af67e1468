from __future__ import annotations

from typing import TYPE_CHECKING

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
from neo_export.passes.fold_bias import fold_bias, hidden_sums
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = TinyConfig()
SUMS = 2 * len(CONFIG.attention_layers)


def fused(name: str) -> ir.Model:
    model = bound_graph(name, CONFIG)
    apply_pass(fuse_skip_layer_norm, model)
    return model


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_with_fewer_operators(name: str) -> None:
    before, after = fused(name), fused(name)
    assert apply_pass(fold_bias, after) == SUMS
    assert operators(before)["Add"] - operators(after)["Add"] == SUMS
    # The first norm is that of the embedding, which has no bias.
    assert [len(n.inputs) for n in nodes_of(after, "SkipLayerNormalization")] == [4] + SUMS * [5]
    assert_same_outputs(before, after, situations(name, CONFIG), 2e-6)
    assert apply_pass(fold_bias, after) == 0


def test_what_is_gone_can_be_put_back() -> None:
    before, after = fused("score"), fused("score")
    apply_pass(fold_bias, after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))
    sums = hidden_sums(after.graph)
    places = {f"transformer.h.{n}.{place}" for n in range(2) for place in ("attention", "mlp")}
    assert places <= sums.keys()
    for name, (product, bias) in sums.items():
        add = value_named(before, name).producer()
        assert add is not None
        assert {value.name for value in add.inputs if value} == {product.name, bias.name}
    assert not hidden_sums(before.graph)


def _total(model: ir.Model) -> ir.Value:
    """A sum that the pass would fold."""
    return value_named(model, "transformer.h.0.attention")


def _shown(model: ir.Model) -> None:
    model.graph.outputs.append(_total(model))


def _read_twice(model: ir.Model) -> None:
    model.graph.append(ir.node("Identity", [_total(model)]))


def _computed_bias(model: ir.Model) -> None:
    add = _total(model).producer()
    assert add is not None
    [place] = [n for n, v in enumerate(add.inputs) if v is not None and v.is_initializer()]
    through_identity(model, add, place)


def _a_table(model: ir.Model) -> None:
    add = _total(model).producer()
    assert add is not None
    [bias] = [v for v in add.inputs if v is not None and v.is_initializer()]
    bias.shape = ir.Shape([1, CONFIG.hidden_size])


@pytest.mark.parametrize("change", [_shown, _read_twice, _computed_bias, _a_table])
def test_must_not_fire(change: Callable[[ir.Model], None]) -> None:
    model = fused("score")
    change(model)
    assert fold_bias(model) == SUMS - 1
    assert _total(model).producer() is not None
    assert _total(model).name not in hidden_sums(model.graph)
