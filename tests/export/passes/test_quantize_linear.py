"""4 and 8 bits as ONNX's own operators: what is stored is what ONNX's evaluator reads back."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.graphs import apply_pass, bound_graph, nodes_of, operators, random_parameters
from helpers.models import TinyConfig
from neo_export.passes.quantize_linear import quantize_linear_weights
from neo_export.passes.static_cache import static_cache
from neo_export.quantize.linear import LEVELS, quantize_linear
from neo_export.quantize.plan import Storage, WeightPlan
from onnx import helper
from onnx.reference import ReferenceEvaluator

CONFIG = TinyConfig(head_dim=32, num_heads=2)
TYPES = {
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    "fp8": onnx.TensorProto.FLOAT8E4M3FN,
}
KINDS = sorted(TYPES)
PRODUCTS = 12
"""Matrices of two layers that multiply activations."""


def plan(kind: str) -> WeightPlan:
    tables = ("transformer.wte.weight", "lm_head.weight")
    return WeightPlan.uniform(kind, 32 if kind == "int4" else None).keeping(tables)


def quantized(kind: str, largest: float | None = None) -> ir.Model:
    model = bound_graph("selective", CONFIG)
    apply_pass(static_cache(CONFIG.max_position_embeddings), model)
    known = None if largest is None else lambda _: largest
    assert apply_pass(quantize_linear_weights(plan(kind), known), model) == PRODUCTS
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_reads_back_what_was_meant(kind: str) -> None:
    """The packed bytes and the layout of the scales, by ONNX's own DequantizeLinear."""
    model = quantized(kind)
    weights = random_parameters(CONFIG)
    for node in nodes_of(model, "DequantizeLinear"):
        values, scales = node.inputs[:2]
        assert values is not None
        assert scales is not None
        name = str(values.name).partition(f".{kind}")[0]
        tensors = [ir.serde.serialize_tensor(v.const_value) for v in (values, scales)]
        assert [t.data_type for t in tensors] == [TYPES[kind], onnx.TensorProto.FLOAT16]
        attributes = {k: a.value for k, a in node.attributes.items()}
        for tensor, label in zip(tensors, ("q", "s"), strict=True):
            tensor.name = label
        graph = helper.make_graph(
            [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **attributes)],
            "read",
            [],
            [helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT16, None)],
            tensors,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
        [found] = ReferenceEvaluator(proto).run(None, {})
        expected = quantize_linear(weights[name], kind, 32 if kind == "int4" else None).read_back()
        np.testing.assert_allclose(found.astype(np.float32), expected.T, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_as_fine_as_the_format(kind: str) -> None:
    weight = np.random.default_rng(0).normal(size=(24, 256)).astype(np.float32)
    block = 64 if kind == "int4" else None
    stored = quantize_linear(weight, kind, block)
    assert stored.scales.dtype == np.float16
    assert (stored.scales > 0).all(), "TensorRT wants positive scales"
    groups = weight.reshape(24, stored.scales.shape[1], -1)
    scales = stored.scales.astype(np.float32)[..., None]
    off = np.abs(stored.read_back().reshape(groups.shape) - groups)
    if kind == "fp8":
        # Half a step: 2⁻⁴ of a normal number's binade, 2⁻¹⁰ of a scale below.
        assert (off <= np.maximum(np.abs(groups) * 2.0**-4, scales * 2.0**-10) * 1.001).all()
    else:
        inside = np.abs(groups) <= scales * LEVELS[kind]
        assert (off[inside] <= (scales / 2 * 1.001 + np.zeros_like(off))[inside]).all()
    assert (
        np.linalg.norm(off) / np.linalg.norm(weight)
        < {"int8": 8e-3, "fp8": 3e-2, "int4": 0.11}[kind]
    )
    # Every level of the format is in use, the last one too.
    assert np.abs(stored.values.astype(np.float32)).max() >= LEVELS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_tiny_numbers(kind: str) -> None:
    weight = np.zeros((3, 64), dtype=np.float32)
    weight[1] = 1e-9
    weight[2] = 3e-2
    found = quantize_linear(weight, kind, 32 if kind == "int4" else None).read_back()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, weight, rtol=0.07, atol=1e-6)


def test_only_projections_are_quantized() -> None:
    model = quantized("int4")
    assert operators(model)["DequantizeLinear"] == PRODUCTS
    [table] = [n for n in nodes_of(model, "Gather") if "wte" in str(n.inputs[0])]
    [head] = nodes_of(model, "Gemm")
    assert table.inputs[0] is head.inputs[1], "the tied table is one tensor"
    assert "QuantizeLinear" not in operators(model)


def test_a_kept_weight_is_not_touched() -> None:
    model = bound_graph("score", CONFIG)
    kept = plan("int8").keeping(["*.h.0.*", "*.c_proj.weight"])
    assert apply_pass(quantize_linear_weights(kept), model) == PRODUCTS // 2 - 1
    computed = bound_graph("score", CONFIG)
    assert apply_pass(quantize_linear_weights(WeightPlan(Storage("fp32"))), computed) == 0


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_are_quantized_where_their_range_is_known(kind: str) -> None:
    model = quantized(kind, largest=6.0)
    assert operators(model)["QuantizeLinear"] == PRODUCTS
    [step] = {float(n.inputs[1].const_value.numpy()) for n in nodes_of(model, "QuantizeLinear")}  # type: ignore[union-attr]
    assert step == np.float16(6.0 / LEVELS[kind])
    assert {n.outputs[0].dtype for n in nodes_of(model, "QuantizeLinear")} == {
        ir.DataType(TYPES[kind])
    }


def test_int4_has_no_products_of_its_own() -> None:
    assert "QuantizeLinear" not in operators(quantized("int4", largest=6.0))
