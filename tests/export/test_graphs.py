"""The entry points as written: their interface, their parameters, their operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.graphs import bound_graph, feeds, nodes_of, operators, random_parameters, spec_of
from helpers.models import ODD_CONFIGS, TinyConfig, make_checkpoint
from helpers.running import relative_l2, run_model
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.gpt_neo import graphs
from neo_export.gpt_neo.graphs import GRAPH_NAMES, OPSET, build_graph
from neo_export.gpt_neo.model import WINDOW_KEY, place_name
from neo_export.targets import Quantization
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = TinyConfig(attention_layers=("global", "local", "global"))
LAYERS = len(CONFIG.attention_layers)
ENTRY_POINTS = (*GRAPH_NAMES, "selective")

Interface = dict[str, tuple[str, list[int | str]]]


def interface(values: Any) -> Interface:
    """Name → type and dimensions, of a graph's inputs or outputs."""
    return {
        value.name: (
            str(value.dtype),
            [n if isinstance(n, int) else str(n.value) for n in value.shape],
        )
        for value in values
    }


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_inputs_and_outputs(name: str) -> None:
    graph = build_graph(name, spec_of(CONFIG)).graph
    new: int | str = 1 if name == "decode" else "sequence"
    cache = [(i, part) for i in range(LAYERS) for part in ("key", "value")]
    head: list[int | str] = ["batch", CONFIG.num_heads]
    size = CONFIG.head_dim
    assert interface(graph.inputs) == {
        "input_ids": ("INT64", ["batch", new]),
        "attention_mask": ("INT64", ["batch", "total_sequence"]),
        "position_ids": ("INT64", ["batch", new]),
    } | dict.fromkeys(
        ["logit_positions"] * (name == "selective"), ("INT64", ["batch", "logits_sequence"])
    ) | {
        f"past_key_values.{i}.{part}": ("FLOAT", [*head, "past_sequence", size])
        for i, part in cache
    }
    rows = {"score": "sequence", "selective": "logits_sequence"}.get(name, 1)
    assert interface(graph.outputs) == {"logits": ("FLOAT", ["batch", rows, CONFIG.vocab_size])} | {
        f"present.{i}.{part}": ("FLOAT", [*head, "present_sequence", size]) for i, part in cache
    }


@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_parameters_are_those_of_the_checkpoint(config: str, tmp_path: Path) -> None:
    """Names and shapes, with transformers as the witness."""
    folder = make_checkpoint(tmp_path / "checkpoint", ODD_CONFIGS[config])
    stored = {key: array.shape for key, array in load_file(folder / "model.safetensors").items()}
    for name in ENTRY_POINTS:
        graph = build_graph(name, spec_of(ODD_CONFIGS[config])).graph
        parameters = {
            key: value.shape.numpy()
            for key, value in graph.initializers.items()
            if value.const_value is None and value.shape is not None
        }
        assert parameters == stored, name


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_standard_operators_only(name: str) -> None:
    model = bound_graph(name, CONFIG)
    assert model.opset_imports == {"": OPSET}
    assert {node.domain for node in model.graph} == {""}
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)


def test_graphs_differ_in_what_comes_out() -> None:
    prefill, decode, score = (operators(bound_graph(name, CONFIG)) for name in GRAPH_NAMES)
    assert decode == score
    assert not score - prefill
    assert {"GatherND", "ReduceMax"} <= (prefill - score).keys(), "prefill picks positions"
    assert not {"MatMul", "Gemm", "LayerNormalization", "Softmax"} & (prefill - score).keys()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_nothing_is_written_in_vain(name: str) -> None:
    model = bound_graph(name, CONFIG)
    before = operators(model)
    RemoveUnusedNodesPass()(model)
    assert operators(model) == before


def test_selective_gives_the_positions_that_are_asked_for() -> None:
    inputs = feeds(CONFIG, batch=2, new=9, past=2)
    whole = run_model(bound_graph("score", CONFIG), inputs)
    wanted = np.array([[8, 0, 3], [2, 2, 7]])
    found = run_model(bound_graph("selective", CONFIG), inputs | {"logit_positions": wanted})
    expected = whole.pop("logits")[np.arange(2)[:, None], wanted]
    assert relative_l2(found.pop("logits"), expected).max() < 1e-6
    for name, present in whole.items():
        np.testing.assert_allclose(found[name], present, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("name", "rows"), [("prefill", 1), ("selective", 9)])
def test_only_the_last_position_goes_through_the_last_layer(name: str, rows: int) -> None:
    inputs = feeds(CONFIG, batch=2, new=9, past=2)
    inputs |= {"logit_positions": np.array([[5], [8]])} if name == "selective" else {}
    model = bound_graph(name, CONFIG)
    places = {
        layer: [place_name(layer, place) for place in ("attended", "attention", "mlp", "residual")]
        for layer in (LAYERS - 2, LAYERS - 1)
    }
    for value in [value for node in model.graph for value in node.outputs]:
        if value.name in (*places[LAYERS - 2], *places[LAYERS - 1]):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    found = run_model(model, inputs)
    seen = {layer: [found[name].shape[1] for name in names] for layer, names in places.items()}
    assert seen == {LAYERS - 2: [9, 9, 9, 9], LAYERS - 1: [9, rows, rows, rows]}


def test_each_layer_has_the_mask_of_its_kind() -> None:
    model = bound_graph("score", CONFIG)
    windows = [
        node.inputs[0].metadata_props[WINDOW_KEY]
        for node in nodes_of(model, "Where")
        if node.inputs[0] is not None
    ]
    expected = {"global": "-1", "local": str(CONFIG.window_size)}
    assert windows == [expected[kind] for kind in CONFIG.attention_layers]
    assert len({node.inputs[0] for node in nodes_of(model, "Where")}) == 2, "two masks in all"


@pytest.mark.parametrize(
    ("mask", "last"),
    [
        ([1, 1, 1, 1, 1], 4),
        ([1, 1, 1, 0, 0], 2),
        ([0, 0, 1, 1, 1], 4),
        ([0, 1, 0, 1, 0], 3),
        ([1, 0, 0, 0, 0], 0),
    ],
)
@pytest.mark.parametrize("past", [0, 2])
def test_prefill_gives_the_last_valid_position(mask: list[int], last: int, past: int) -> None:
    """Each row's own: the first row has the mask, the second row is full."""
    inputs = feeds(CONFIG, batch=2, new=len(mask), past=past)
    inputs["attention_mask"][0, past:] = mask
    prefill = run_model(bound_graph("prefill", CONFIG), inputs, ["logits"])["logits"]
    score = run_model(bound_graph("score", CONFIG), inputs, ["logits"])["logits"]
    assert prefill.shape == (2, 1, CONFIG.vocab_size)
    assert relative_l2(prefill[0, 0], score[0, last]).max() < 1e-6
    assert relative_l2(prefill[1, 0], score[1, -1]).max() < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_reads_its_table(tied: bool) -> None:
    """Not the other table: each moves the logits, and only where it is read."""
    config = TinyConfig(tie_word_embeddings=tied)
    parameters = random_parameters(config)
    inputs = feeds(config, batch=1, new=3, past=0)
    before = run_model(bound_graph("score", config, parameters), inputs, ["logits"])["logits"]
    table = "transformer.wte.weight" if tied else "lm_head.weight"
    row = next(i for i in range(config.vocab_size) if i not in inputs["input_ids"])
    parameters[table] = parameters[table].copy()
    parameters[table][row] *= 2.0
    after = run_model(bound_graph("score", config, parameters), inputs, ["logits"])["logits"]
    others = np.delete(np.arange(config.vocab_size), row)
    assert np.allclose(after[..., row], 2.0 * before[..., row], rtol=1e-5)
    assert np.array_equal(after[..., others], before[..., others])


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("cpu", "int8"),
        ("cpu", "int4"),
        ("portable", "fp16"),
        ("cuda", "fp16"),
        ("cuda", "int4"),
        ("tensorrt", "int8"),
    ],
)
def test_passes_change_a_copy(target: str, precision: str, tmp_path: Path) -> None:
    """A graph is written once in a process; what an export does to it, the next does not see."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    quantization = Quantization(block_size=16 if precision == "int4" else None)
    options = ExportOptions(target=target, precision=precision, quantization=quantization)
    export_bundle(str(checkpoint), tmp_path / "bundle", options)
    with open_checkpoint(checkpoint) as opened:
        spec = opened.spec
    for name in ENTRY_POINTS:
        fresh, copied = graphs._built.__wrapped__(name, spec), build_graph(name, spec)
        assert serialized(copied) == serialized(fresh)


def serialized(model: ir.Model) -> bytes:
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return data
