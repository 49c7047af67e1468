from __future__ import annotations

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
    passes_of,
    random_parameters,
    situations,
    spec_of,
)
from helpers.models import TinyConfig
from helpers.running import run_model
from neo_export.passes.quantize_int8 import quantize_int8_weights
from neo_export.passes.quantize_rows import quantize_rows
from neo_export.quantize.plan import WeightPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG = TinyConfig()
LAYERS = len(CONFIG.attention_layers)


def quantized(name: str, parameters: dict[str, NDArray[np.float32]] | None = None) -> ir.Model:
    model = bound_graph(name, CONFIG, parameters)
    assert apply_pass(quantize_int8_weights(WeightPlan.uniform("int8")), model) > 0
    return model


@pytest.mark.parametrize(
    ("name", "products"),
    # Three of six products of prefill's last layer see last positions alone; the head always.
    [("score", 6 * LAYERS), ("prefill", 6 * LAYERS - 3)],
)
def test_outputs_are_the_same(name: str, products: int) -> None:
    before, after = quantized(name), quantized(name)
    assert apply_pass(quantize_rows, after) == products
    was, found = operators(before), operators(after)
    assert found["Div"] == was["Div"] - products
    assert found["QuantizeLinear"] == was["QuantizeLinear"]
    assert found["Mul"] == was["Mul"] + products
    # x / row · 127 and x / (row / 127) part where a product of the two lies between two integers.
    assert_same_outputs(before, after, situations(name, CONFIG), 6e-2)


def test_integers_are_those_of_the_division() -> None:
    """All but a few of them: see above."""
    both = []
    for blocks in (False, True):
        model = quantized("score")
        if blocks:
            apply_pass(quantize_rows, model)
        first = nodes_of(model, "QuantizeLinear")[0].outputs[0]
        first.name, first.dtype = "integers", ir.DataType.UINT8
        model.graph.outputs.append(first)
        inputs = situations("score", CONFIG)[0]
        both.append(run_model(model, inputs)["integers"].astype(int))
    assert np.abs(both[0] - 128).max() == 127
    assert np.abs(both[0] - both[1]).max() <= 1
    assert (both[0] != both[1]).mean() < 1e-2


def test_a_row_of_zeros_stays_zero() -> None:
    parameters = random_parameters(CONFIG)
    for key, value in parameters.items():
        if key.endswith("bias") or key.startswith("transformer.h.0.ln_1"):
            value[:] = 0
    model = quantized("score", parameters)
    before = run_model(model, situations("score", CONFIG)[0])["logits"]
    assert apply_pass(quantize_rows, model) > 0
    after = run_model(model, situations("score", CONFIG)[0])["logits"]
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() < 6e-2 * np.abs(before).max()


def test_must_not_fire_without_integer_products() -> None:
    model = bound_graph("score", CONFIG)
    assert apply_pass(quantize_rows, model) == 0
    assert model.graph.opset_imports[""] == bound_graph("score", CONFIG).graph.opset_imports[""]


def test_must_not_fire_where_integers_are_read_elsewhere() -> None:
    model = quantized("score")
    first = nodes_of(model, "QuantizeLinear")[0]
    product = next(use.node for use in first.outputs[0].uses())
    widen = ir.node("DequantizeLinear", [first.outputs[0], *first.inputs[1:]])
    model.graph.insert_after(first, widen)
    assert apply_pass(quantize_rows, model) == 6 * LAYERS - 1
    assert product.inputs[0] is first.outputs[0]
    assert "block_size" not in first.attributes


@pytest.mark.parametrize(
    ("name", "blocks"), [("score", 4 * LAYERS + 2), ("prefill", 4 * LAYERS - 2), ("decode", 0)]
)
def test_as_shipped(name: str, blocks: int) -> None:
    """With q, k and v packed, but for the last layer, whose q prefill computes for one row.

    Decode has one row: the zero points would be one operator more.
    """
    model = bound_graph(name, CONFIG)
    for step in passes_of("cpu", "int8", name, spec_of(CONFIG)):
        apply_pass(step, model)
    found = [n for n in nodes_of(model, "QuantizeLinear") if "block_size" in n.attributes]
    assert len(found) == blocks


def test_must_not_fire_for_one_row() -> None:
    assert apply_pass(quantize_rows, quantized("decode")) == 0


def test_a_prompt_of_one_token() -> None:
    inputs = {k: v[:1, :1] for k, v in situations("score", CONFIG)[0].items() if v.ndim == 2}
    inputs |= {k: v[:1, :, :0] for k, v in situations("score", CONFIG)[0].items() if v.ndim == 4}
    model = quantized("score")
    before = run_model(model, inputs)["logits"]
    apply_pass(quantize_rows, model)
    assert np.abs(run_model(model, inputs)["logits"] - before).max() < 6e-2


@pytest.mark.parametrize(("had", "has"), [(18, 21), (24, 24)])
def test_a_newer_opset_stays(had: int, has: int) -> None:
    model = quantized("score")
    model.graph.opset_imports[""] = had
    assert apply_pass(quantize_rows, model) > 0
    assert model.graph.opset_imports[""] == has
