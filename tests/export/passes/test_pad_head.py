from __future__ import annotations

import numpy as np
import pytest
from helpers.graphs import (
    apply_pass,
    assert_same_outputs,
    bound_graph,
    operators,
    random_parameters,
    situations,
    spec_of,
)
from helpers.models import TinyConfig
from neo_export.bundle.probes import probes_of
from neo_export.gpt_neo.graphs import GRAPH_NAMES, build_graph
from neo_export.passes.candidates import candidates
from neo_export.passes.pad_head import MULTIPLE, pad_head
from neo_export.passes.quantize_int4 import quantize_int4_weights
from neo_export.quantize.plan import WeightPlan

CONFIG = TinyConfig(vocab_size=61)
TABLE = "transformer.wte.weight"
UNTIED = TinyConfig(vocab_size=61, tie_word_embeddings=False)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_same_outputs_from_a_wider_product(name: str, config: TinyConfig) -> None:
    before, after = bound_graph(name, config), bound_graph(name, config)
    assert apply_pass(pad_head, after) == 1
    assert operators(after)["Slice"] == operators(before)["Slice"] + 1
    assert_same_outputs(before, after, situations(name, config), 1e-6)
    assert probes_of(after, spec_of(config)) == probes_of(before, spec_of(config))


def test_the_new_rows_are_zeros_behind_the_old() -> None:
    model = bound_graph("score", CONFIG)
    apply_pass(pad_head, model)
    table = model.graph.initializers[TABLE].const_value
    assert table is not None
    assert table.numpy().shape[0] == MULTIPLE
    assert np.array_equal(table.numpy()[:61], random_parameters(CONFIG)[TABLE])
    assert not table.numpy()[61:].any()


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_int4_with_its_scales_and_the_rows_that_are_looked_up(name: str) -> None:
    quantize = quantize_int4_weights(WeightPlan.uniform("int4", 32))
    before, after = bound_graph(name, CONFIG), bound_graph(name, CONFIG)
    for model in (before, after):
        apply_pass(quantize, model)
    assert apply_pass(pad_head, after) == 2
    head = next(
        n for n in after.graph if n.op_type == "MatMulNBits" and n.inputs[1].name.startswith(TABLE)
    )  # type: ignore[union-attr]
    assert head.attributes.get_int("N") == MULTIPLE
    shapes = {
        n: v.shape[0]
        for n, v in after.graph.initializers.items()
        if n.startswith(f"{TABLE}.int4") and v.shape
    }
    assert shapes == dict.fromkeys(
        (f"{TABLE}.int4", f"{TABLE}.int4.scales", f"{TABLE}.int4.rows"), MULTIPLE
    )
    assert_same_outputs(before, after, situations(name, CONFIG), 1e-6)


def test_candidates_are_of_the_vocabulary() -> None:
    model = bound_graph("decode", CONFIG)
    apply_pass(pad_head, model)
    apply_pass(candidates, model)
    shapes = {value.name: value.shape for value in model.graph.outputs}
    assert shapes["top_ids"] == ["batch", 1, 61]


def test_must_not_fire_for_a_vocabulary_that_fits() -> None:
    assert apply_pass(pad_head, bound_graph("score", TinyConfig(vocab_size=2 * MULTIPLE))) == 0


def test_must_not_fire_for_what_no_pass_has_stored() -> None:
    """A table in float32 is the checkpoint's own, mapped as it lies."""
    assert pad_head(build_graph("score", spec_of(CONFIG))) == 0
