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
)
from helpers.models import TinyConfig, make_checkpoint
from neo_export.bundle.probes import probes_of
from neo_export.bundle.weights import write_weights
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.passes._tensors import ALIAS_KEY
from neo_export.passes.half_positions import half_positions
from neo_export.passes.quantize_int4 import quantize_int4_weights
from neo_export.quantize.int4 import dequantize_int4, quantize_int4
from neo_export.quantize.plan import WeightPlan
from neo_export.targets import Quantization
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = TinyConfig()
LAYERS = len(CONFIG.attention_layers)
LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")
PRODUCTS = len(LINEAR) * LAYERS + 1
TABLE = "transformer.wte.weight"
BLOCK = 16
WIDE = TinyConfig(num_heads=8, head_dim=64, vocab_size=8000, max_position_embeddings=64)
"""512 inputs: as in real models, what is not a matrix hardly counts."""


def quantized(name: str = "score", config: TinyConfig = CONFIG, block: int = BLOCK) -> ir.Model:
    model = bound_graph(name, config)
    assert (
        apply_pass(quantize_int4_weights(WeightPlan.uniform("int4", block)), model) == PRODUCTS + 1
    )
    return model


def _names(node: ir.Node) -> set[str]:
    return {str(value.name) for value in node.inputs if value is not None}


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_product_and_the_table(name: str) -> None:
    found, was = operators(quantized(name)), operators(bound_graph(name, CONFIG))
    assert found["MatMulNBits"] == PRODUCTS
    assert found["GatherBlockQuantized"] == 1
    assert found["Gemm"] == 0
    assert found["MatMul"] == was["MatMul"] - (PRODUCTS - 1), "only attention's are left"


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_outputs_are_those_of_the_dequantized_weights(name: str) -> None:
    parameters = {
        key: dequantize_int4(value, BLOCK) if value.ndim == 2 and "wpe" not in key else value
        for key, value in random_parameters(CONFIG).items()
    }
    before, after = bound_graph(name, CONFIG, parameters), quantized(name)
    for node in nodes_of(after, "MatMulNBits"):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    assert_same_outputs(before, after, situations(name, CONFIG), 1e-5)
    assert_same_outputs(before, quantized(name), situations(name, CONFIG), 6e-2)


def test_places_keep_their_names() -> None:
    before = bound_graph("score", CONFIG)
    assert probes_of(quantized(), spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


def test_attributes() -> None:
    for node in nodes_of(quantized(), "MatMulNBits"):
        packed = node.inputs[1]
        assert packed is not None
        assert packed.shape is not None
        assert packed.shape.numpy() == (
            node.attributes.get_int("N"),
            node.attributes.get_int("K", 0) // BLOCK,
            BLOCK // 2,
        )
        assert node.attributes.get_int("bits") == 4
        assert node.attributes.get_int("block_size") == BLOCK
        assert node.attributes.get_int("accuracy_level") == 4


def test_the_tied_table_is_stored_once() -> None:
    """Two shapes of one place of the file, one array of scales."""
    model = quantized()
    [gather] = nodes_of(model, "GatherBlockQuantized")
    [head] = [n for n in nodes_of(model, "MatMulNBits") if f"{TABLE}.int4" in _names(n)]
    rows, packed = gather.inputs[0], head.inputs[1]
    assert rows is not None
    assert packed is not None
    assert rows.metadata_props[ALIAS_KEY] == packed.name
    assert gather.inputs[2] is head.inputs[2]
    assert rows.const_value is not None
    expected = quantize_int4(random_parameters(CONFIG)[TABLE], BLOCK).packed
    assert np.array_equal(rows.const_value.numpy(), expected.reshape(CONFIG.vocab_size, -1))


def test_both_shapes_refer_to_the_same_bytes(tmp_path: Path) -> None:
    model = quantized()
    write_weights({"score": model}, tmp_path)
    tensors = [
        model.graph.initializers[name].const_value
        for name in (f"{TABLE}.int4", f"{TABLE}.int4.rows")
    ]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    places = {(t.offset, t.length) for t in tensors if isinstance(t, ir.ExternalTensor)}
    assert len(places) == 1


def test_an_untied_head_is_a_table_of_its_own() -> None:
    model = quantized("score", TinyConfig(tie_word_embeddings=False))
    read = {name for node in model.graph for name in _names(node)}
    assert {f"{TABLE}.int4", "lm_head.weight.int4"} <= read
    assert f"{TABLE}.int4.rows" not in read, "it has one reader, and one shape"


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (("transformer.h.0.*",), len(LINEAR)),
        (("*.c_proj.weight",), LAYERS),
        (("transformer.wte.weight",), 1),
        (("*",), PRODUCTS),
    ],
)
def test_kept_weights_stay(keep: tuple[str, ...], kept: int) -> None:
    model = bound_graph("score", CONFIG)
    apply_pass(quantize_int4_weights(WeightPlan.uniform("int4", BLOCK, keep)), model)
    assert len(nodes_of(model, "MatMulNBits")) == PRODUCTS - kept
    assert operators(model)["GatherBlockQuantized"] == ("wte" not in keep[0] and keep != ("*",))


def test_must_not_fire_for_a_computed_weight() -> None:
    model = bound_graph("score", CONFIG)
    turn = next(
        node
        for node in nodes_of(model, "Transpose")
        if "transformer.h.1.mlp.c_fc.weight" in _names(node)
    )
    through_identity(model, turn, 0)
    assert apply_pass(quantize_int4_weights(WeightPlan.uniform("int4", BLOCK)), model) == PRODUCTS
    assert turn in list(model.graph)


def test_block_size_that_does_not_fit(tmp_path: Path) -> None:
    """A user's mistake, said before anything is written: which sizes would do."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TinyConfig(num_heads=3, head_dim=32))
    for size in (64, 24):
        options = ExportOptions(precision="int4", quantization=Quantization(block_size=size))
        message = rf"block size {size} does not fit .*96 inputs; use one of 16, 32$"
        with pytest.raises(RequestError, match=message):
            export_bundle(str(checkpoint), tmp_path / "bundle", options)
        assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("block", [32, 64])
def test_bytes_of_the_weight_file(block: int, tmp_path: Path) -> None:
    """4 bits and a block's share of a scale for each parameter: 2 % more at most."""
    models = {name: quantized(name, WIDE, block) for name in GRAPH_NAMES}
    for model in models.values():
        assert apply_pass(half_positions, model) == 1
    written = write_weights(models, tmp_path)
    parameters = sum(math.prod(shape) for shape in expected_shapes(spec_of(WIDE)).values())
    assert written.size <= 1.02 * parameters * (4 + 32 / block) / 8
    matrices = len(LINEAR) * LAYERS + 1
    others = 4 * LAYERS + 2 + 3 * LAYERS  # norms and their biases, biases of products
    assert stored_tensors(models) == 2 * matrices + others + 1


def test_int8_prefill(tmp_path: Path) -> None:
    """Prefill and score read an int8 copy, decode the int4 one."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    sizes = {}
    for int8_prefill in (False, True):
        quantization = Quantization(block_size=BLOCK, int8_prefill=int8_prefill)
        options = ExportOptions(precision="int4", quantization=quantization)
        summary = export_bundle(str(checkpoint), tmp_path / f"{int8_prefill}", options)
        sizes[int8_prefill] = summary.weight_bytes
        for graph in summary.graphs:
            eight = int8_prefill and graph.name != "decode"
            assert ("MatMulIntegerToFloat" in graph.operators) == eight
            assert ("MatMulNBits" in graph.operators) == (not eight)
    assert sizes[True] > 2 * sizes[False]
