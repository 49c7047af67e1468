"""Numbers are the subject of ../test_quantize.py and ../test_quantized_parity.py."""

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
    random_parameters,
    situations,
    spec_of,
    stored_tensors,
    through_identity,
    value_named,
)
from helpers.models import TinyConfig
from helpers.running import run_model
from neo_export.bundle.probes import probes_of
from neo_export.bundle.weights import write_weights
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.passes.fuse_gelu import fuse_gelu_behind_bias
from neo_export.passes.half_positions import half_positions
from neo_export.passes.quantize_int8 import quantize_int8_weights
from neo_export.quantize.int8 import dequantize_int8, quantize_int8
from neo_export.quantize.plan import WeightPlan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CONFIG = TinyConfig()
LAYERS = len(CONFIG.attention_layers)
LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
PRODUCTS = len(LINEAR) * LAYERS + 1
TABLE = "transformer.wte.weight"
WIDE = TinyConfig(num_heads=8, head_dim=64, vocab_size=2000, max_position_embeddings=64)
"""512 inputs: as in real models, what is not a matrix hardly counts."""


def quantized(name: str = "score", config: TinyConfig = CONFIG, *keep: str) -> ir.Model:
    model = bound_graph(name, config)
    assert apply_pass(quantize_int8_weights(WeightPlan.uniform("int8", keep=keep)), model) > 0
    return model


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_product_and_the_table(name: str) -> None:
    before, after = bound_graph(name, CONFIG), bound_graph(name, CONFIG)
    assert apply_pass(quantize_int8_weights(WeightPlan.uniform("int8")), after) == PRODUCTS + 1
    found, was = operators(after), operators(before)
    assert found["MatMulIntegerToFloat"] == found["QuantizeLinear"] == PRODUCTS
    assert found["Gemm"] == 0
    assert found["MatMul"] == was["MatMul"] - (PRODUCTS - 1), "only attention's are left"


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_outputs_are_those_of_the_dequantized_weights(name: str) -> None:
    parameters = {
        key: dequantize_int8(value) if value.ndim == 2 and "wpe" not in key else value
        for key, value in random_parameters(CONFIG).items()
    }
    before = bound_graph(name, CONFIG, parameters)
    # Random cached positions make some attention outputs small, so that little counts for much.
    assert_same_outputs(before, quantized(name), situations(name, CONFIG), 6e-2)


@pytest.mark.parametrize("zero_row", [0, 3])
def test_a_row_of_zeros_does_no_harm(zero_row: int) -> None:
    """Neither as an activation (all of an embedding, norms without bias) nor as a weight."""
    parameters = random_parameters(CONFIG)
    parameters[TABLE][zero_row] = 0
    parameters["transformer.wpe.weight"][0] = 0
    for key, value in parameters.items():
        if key.endswith("bias"):
            value[:] = 0
    model = bound_graph("score", CONFIG, parameters)
    apply_pass(quantize_int8_weights(WeightPlan.uniform("int8")), model)
    inputs = situations("score", CONFIG)[0]
    inputs["input_ids"][0, 0] = zero_row
    read_back = {
        key: dequantize_int8(value) if value.ndim == 2 and "wpe" not in key else value
        for key, value in parameters.items()
    }
    assert not read_back[TABLE][zero_row].any()
    found = run_model(model, inputs)["logits"]
    assert np.isfinite(found).all()
    expected = run_model(bound_graph("score", CONFIG, read_back), inputs)["logits"]
    assert np.allclose(found[0, 0], expected[0, 0], atol=1e-6)


def test_places_keep_their_names() -> None:
    before = bound_graph("score", CONFIG)
    assert probes_of(quantized(), spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_activations_are_scaled_a_row() -> None:
    model = quantized()
    for node in nodes_of(model, "QuantizeLinear"):
        assert node.inputs[0] is not None
        divide = node.inputs[0].producer()
        assert divide is not None
        assert divide.op_type == "Div"
        scale, zero = (value.const_value for value in node.inputs[1:3] if value is not None)
        assert scale is not None
        assert zero is not None
        assert float(scale.numpy()) == pytest.approx(1 / 127)
        assert int(zero.numpy()) == 128
    for node in nodes_of(model, "ReduceMax"):
        assert node.attributes.get_int("keepdims") == 1


def behind_gelu(parameters: dict[str, NDArray[np.float32]] | None = None) -> ir.Model:
    model = bound_graph("score", CONFIG, parameters)
    assert apply_pass(fuse_gelu_behind_bias, model) == LAYERS
    assert apply_pass(quantize_int8_weights(WeightPlan.uniform("int8")), model) > 0
    return model


def test_gelu_is_never_as_low_as_its_rows_are_taken_to_be() -> None:
    """So the largest value of a row is its largest magnitude, or less than that constant."""
    [depth] = {
        float(value.const_value.numpy())
        for node in nodes_of(behind_gelu(), "Max")
        for value in node.inputs
        if value is not None and value.name == "int8.gelu_depth" and value.const_value is not None
    }
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None]))
    gelu = ir.node("FastGelu", [x], domain="com.microsoft")
    gelu.outputs[0].name, gelu.outputs[0].type = "y", x.type
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([x], gelu.outputs, nodes=[gelu], opset_imports=opsets, name="gelu")
    values = np.linspace(-20, 2, 1_000_001, dtype=np.float32)
    lowest = run_model(ir.Model(graph, ir_version=10), {"x": values})["y"].min()
    assert -depth < lowest < -0.99 * depth


def test_rows_behind_gelu_are_scaled_by_their_largest_value() -> None:
    model = behind_gelu()
    assert operators(model)["Abs"] == PRODUCTS - LAYERS
    for node in nodes_of(model, "FastGelu"):
        readers = {use.node.op_type for use in node.outputs[0].uses()}
        assert readers == {"ReduceMax", "Div"}
    assert_same_outputs(quantized(), model, situations("score", CONFIG), 6e-2)


@pytest.mark.parametrize("bias", [-0.7525, -6.0, 0.05])
def test_a_small_row_behind_gelu_is_off_by_half_a_step(bias: float) -> None:
    """At GELU's minimum, far below it, and where all of it is small."""
    parameters = random_parameters(CONFIG)
    place = f"transformer.h.{LAYERS - 1}.mlp"
    parameters[f"{place}.c_fc.weight"][:] = 0
    parameters[f"{place}.c_fc.bias"][:] = bias
    model = behind_gelu(parameters)
    value = value_named(model, place)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(value)
    found = run_model(model, situations("score", CONFIG)[0])[place]
    gelu = bias * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (bias + 0.044715 * bias**3)))
    weight = dequantize_int8(parameters[f"{place}.c_proj.weight"])
    expected = gelu * weight.sum(axis=1) + parameters[f"{place}.c_proj.bias"]
    half_step = 0.171 / 127 / 2
    assert (np.abs(found - expected) <= half_step * np.abs(weight).sum(axis=1) + 1e-6).all()


def test_the_tied_table_is_stored_once() -> None:
    model = quantized()
    [turn] = [n for n in nodes_of(model, "Transpose") if f"{TABLE}.int8" in _names(n)]
    [head] = [n for n in nodes_of(model, "MatMulIntegerToFloat") if f"{TABLE}.int8" in _names(n)]
    assert turn.inputs[0] is head.inputs[1]
    assert {use.node.op_type for use in turn.outputs[0].uses()} == {"Gather"}
    table = model.graph.initializers[f"{TABLE}.int8"]
    assert table.shape == (CONFIG.hidden_size, CONFIG.vocab_size)
    assert table.const_value is not None
    expected = quantize_int8(random_parameters(CONFIG)[TABLE]).integers.T
    assert np.array_equal(table.const_value.numpy(), expected)
    assert TABLE not in {name for node in model.graph for name in _names(node)}


def _names(node: ir.Node) -> set[str]:
    return {str(value.name) for value in node.inputs if value is not None}


def test_an_untied_head_is_a_table_of_its_own() -> None:
    config = TinyConfig(tie_word_embeddings=False)
    model = quantized("score", config)
    read = {name for node in model.graph for name in _names(node)}
    assert {f"{TABLE}.int8", "lm_head.weight.int8"} <= read
    assert len(nodes_of(model, "MatMulIntegerToFloat")) == PRODUCTS


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (("transformer.h.0.*",), len(LINEAR)),
        (("*.q_proj.weight", "*.c_fc.weight"), 2 * LAYERS),
        (("transformer.wte.weight",), 1),
        (("*",), PRODUCTS),
        (("*.Q_PROJ.*", "wte"), 0),
    ],
)
def test_kept_weights_stay(keep: tuple[str, ...], kept: int) -> None:
    model = bound_graph("score", CONFIG)
    apply_pass(quantize_int8_weights(WeightPlan.uniform("int8", keep=keep)), model)
    assert len(nodes_of(model, "MatMulIntegerToFloat")) == PRODUCTS - kept
    assert operators(model)["Gemm"] == (keep in (("transformer.wte.weight",), ("*",)))


def test_must_not_fire_for_a_computed_weight() -> None:
    model = bound_graph("score", CONFIG)
    turn = next(
        node
        for node in nodes_of(model, "Transpose")
        if "transformer.h.1.mlp.c_fc.weight" in _names(node)
    )
    through_identity(model, turn, 0)
    assert apply_pass(quantize_int8_weights(WeightPlan.uniform("int8")), model) == PRODUCTS
    assert turn in list(model.graph)


def test_bytes_of_the_weight_file(tmp_path: Path) -> None:
    """8 bits a parameter and 2 % more at most."""
    models = {name: quantized(name, WIDE) for name in GRAPH_NAMES}
    for model in models.values():
        assert apply_pass(half_positions, model) == 1
    written = write_weights(models, tmp_path)
    parameters = sum(math.prod(shape) for shape in expected_shapes(spec_of(WIDE)).values())
    assert written.size <= 1.02 * parameters
    assert (tmp_path / "weights.bin").stat().st_size == written.size
    matrices = len(LINEAR) * LAYERS + 1
    others = 4 * LAYERS + 2 + 3 * LAYERS  # norms and their biases, biases of products
    assert stored_tensors(models) == 2 * matrices + others + 1
