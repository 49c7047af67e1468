"""Numbers, and the arithmetic inside, are the subject of ../test_float16.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from helpers.graphs import (
    ALIKE,
    apply_pass,
    bound_graph,
    feeds,
    nodes_of,
    operators,
    random_parameters,
    spec_of,
)
from helpers.models import TinyConfig
from helpers.running import relative_l2, run_model
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.passes._wide import Wide
from neo_export.passes.float16 import float16
from neo_export.passes.fuse_attention import fuse_attention
from neo_export.passes.fuse_gelu import fuse_gelu
from neo_export.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from neo_export.passes.pack_qkv import pack_qkv
from neo_export.passes.store_transposed import store_transposed
from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import CheckpointError

CONFIG = TinyConfig()
FUSIONS = (fuse_attention, pack_qkv(ALIKE), fuse_gelu, fuse_skip_layer_norm)
LIMIT = TOLERANCES["fp16"].logits


def graph(name: str, *, fused: bool) -> ir.Model:
    model = bound_graph(name, CONFIG)
    for rewrite in FUSIONS if fused else ():
        assert apply_pass(rewrite, model) > 0
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_nearly_the_same_outputs(name: str, fused: bool) -> None:
    before, after = graph(name, fused=fused), graph(name, fused=fused)
    apply_pass(float16(Wide()), after)
    assert operators(after) == operators(before)
    full = feeds(CONFIG, batch=1, new=1 if name == "decode" else 9, past=6)
    half = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in full.items()}
    expected, found = run_model(before, full), run_model(after, half)
    assert found["logits"].dtype == np.float32
    for key, value in expected.items():
        assert found[key].dtype == (np.float32 if key == "logits" else np.float16)
        assert relative_l2(found[key], value).max() <= LIMIT, key


@pytest.mark.parametrize("fused", [False, True])
def test_every_weight_becomes_float16(fused: bool) -> None:
    model = graph("score", fused=fused)
    apply_pass(store_transposed, model)
    weights = {
        value
        for node in model.graph
        for value in node.inputs
        if value is not None and value.is_initializer() and "transformer" in str(value.name)
    }
    assert float16(Wide())(model) == len(weights)
    read = [v for node in model.graph for v in node.inputs if v is not None and v.is_initializer()]
    wide = {v.name for v in read if v.dtype == ir.DataType.FLOAT}
    # Only the value of a masked score, which is compared with float32 scores.
    where = {str(node.inputs[2].name) for node in nodes_of(model, "Where") if node.inputs[2]}
    assert wide == (set() if fused else where)
    assert not any(v.dtype == ir.DataType.FLOAT and not v.uses() for v in read)


def test_the_portable_form_keeps_scores_wide() -> None:
    model = graph("score", fused=False)
    apply_pass(float16(Wide()), model)
    for softmax in nodes_of(model, "Softmax"):
        where = softmax.inputs[0]
        assert where is not None
        assert where.dtype == ir.DataType.FLOAT
        producer = where.producer()
        assert producer is not None
        scores = producer.inputs[1]
        assert scores is not None
        assert scores.dtype == ir.DataType.FLOAT
        product = scores.producer()
        assert product is not None
        assert [v.dtype for v in product.inputs if v is not None] == [ir.DataType.FLOAT] * 2
    for product in nodes_of(model, "Gemm"):
        assert product.outputs[0].dtype == ir.DataType.FLOAT16


def test_statistics_of_the_fused_norm_stay_wide() -> None:
    """The operator defines its mean and deviation as float32."""
    model = graph("score", fused=True)
    apply_pass(float16(Wide()), model)
    for node in nodes_of(model, "SkipLayerNormalization"):
        kinds = [output.dtype for output in node.outputs]
        half, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
        assert kinds == [half, full, full, half]


@pytest.mark.parametrize("fused", [False, True])
def test_places_keep_their_names(fused: bool) -> None:
    before, after = graph("score", fused=fused), graph("score", fused=fused)
    apply_pass(float16(Wide()), after)
    assert probes_of(after, spec_of(CONFIG)) == probes_of(before, spec_of(CONFIG))


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_a_weight_beyond_half_precision_is_named_when_it_is_read(value: float) -> None:
    parameters = random_parameters(CONFIG)
    name = "transformer.h.0.ln_1.bias"
    parameters[name][2] = value
    model = bound_graph("score", CONFIG, parameters)
    apply_pass(float16(Wide()), model)
    half = model.graph.initializers[f"{name}.float16"].const_value
    assert half is not None
    with pytest.raises(CheckpointError, match=name):
        half.numpy()
