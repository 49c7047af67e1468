"""Attention over a static cache: the same function as the portable graph, in half precision too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.graphs import (
    apply_pass,
    bound_graph,
    feeds,
    nodes_of,
    operators,
    through_identity,
    value_named,
)
from helpers.models import ODD_CONFIGS, Reference, TinyConfig, make_checkpoint, random_ids
from helpers.running import Graphs, assert_agrees, relative_l2, run_model
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.gpt_neo.model import WINDOW_KEY, place_name
from neo_export.passes.static_cache import static_cache
from neo_export.targets import Quantization
from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import RequestError
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CONFIG = TinyConfig()
LENGTH = CONFIG.max_position_embeddings
LIMIT = TOLERANCES["fp32"].logits
HALF = TOLERANCES["fp16"].logits
JUNK = 50.0
"""In slots that were never written: finite, and large enough to show."""


def static_feeds(portable: dict[str, NDArray[Any]], length: int) -> dict[str, NDArray[Any]]:
    """The same call for a static cache: the past at the front, junk behind."""
    inputs = {k: v for k, v in portable.items() if k != "attention_mask"}
    for name, past in portable.items():
        if name.startswith("past_key_values."):
            whole = np.full((*past.shape[:2], length, past.shape[3]), JUNK, past.dtype)
            whole[:, :, : past.shape[2]] = past
            inputs[name] = whole
    return inputs


@pytest.mark.parametrize("graph", ["score", "decode"])
@pytest.mark.parametrize("name", ["plain", "all_global", "all_local", "window_1", "head_size_12"])
def test_same_outputs_before_and_after(name: str, graph: str) -> None:
    config = ODD_CONFIGS[name]
    before, after = bound_graph(graph, config), bound_graph(graph, config)
    assert apply_pass(static_cache(LENGTH), after) == 2
    for new, past in ((1, 0), (1, 13), (1, LENGTH - 1)) + (
        ((11, 0), (12, 3), (LENGTH - 3, 3)) if graph == "score" else ()
    ):
        given = feeds(config, batch=2, new=new, past=past)
        expected = run_model(before, given)
        found = run_model(after, static_feeds(given, LENGTH))
        assert relative_l2(found["logits"], expected["logits"]).max() <= LIMIT
        for key, value in expected.items():
            if key.startswith("present."):
                assert found[key].shape[2] == LENGTH
                np.testing.assert_allclose(found[key][:, :, : past + new], value, atol=1e-5)
                assert (found[key][:, :, past + new :] == JUNK).all(), "nothing else is written"


def test_form() -> None:
    """What TensorRT's parser takes: standard operators, one output, a scale, no foreign domain."""
    model = bound_graph("selective", CONFIG)
    apply_pass(static_cache(LENGTH), model)
    assert {node.domain for node in model.graph} == {""}
    assert model.graph.opset_imports == {"": 24}
    for node in nodes_of(model, "Attention"):
        assert len(node.outputs) == 1
        assert node.attributes.get_float("scale") == 1.0
        assert "softmax_precision" not in node.attributes
        mask = node.inputs[3]
        assert mask is not None
    masks = [node.inputs[3].name for node in nodes_of(model, "Attention")]  # type: ignore[union-attr]
    assert masks == ["causal_mask", "windowed_mask"]
    assert operators(model)["TensorScatter"] == 4
    names = [value.name for value in model.graph.inputs][:3]
    assert names == ["input_ids", "position_ids", "logit_positions"]
    for place in ("key", "value", "attention", "mlp", "residual"):
        assert value_named(model, place_name(1, place))


def test_a_mask_of_another_kind_is_an_error() -> None:
    model = bound_graph("score", CONFIG)
    where = nodes_of(model, "Where")[0]
    through_identity(model, where, 0)
    mask = where.inputs[0]
    assert mask is not None
    mask.metadata_props.pop(WINDOW_KEY, None)
    with pytest.raises(AssertionError, match="1 of 2 layers"):
        apply_pass(static_cache(LENGTH), model)


def evaluate(path: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of all positions by ONNX's evaluator: numpy's own half-precision arithmetic."""
    evaluator = ReferenceEvaluator(str(path))
    positions = np.arange(ids.shape[1])[None]
    given: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": positions,
        "logit_positions": positions,
    }
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        if value.name.startswith("past_key_values."):
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            given[value.name] = np.zeros((1, *dims[1:]), dtype=kind)
    with np.errstate(all="ignore"):
        logits: NDArray[np.float32] = evaluator.run(["logits"], given)[0]
    return logits


def export_half(source: Path, folder: Path) -> Path:
    export_bundle(str(source), folder, ExportOptions(target="tensorrt", precision="fp16"))
    return folder


@pytest.mark.parametrize("name", ["plain", "untied_head", "head_size_80"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    """onnxruntime and real half arithmetic, against float32 PyTorch."""
    config = ODD_CONFIGS[name]
    reference = Reference(make_checkpoint(tmp_path / "checkpoint", config))
    graphs = Graphs(export_half(tmp_path / "checkpoint", tmp_path / "bundle"))
    ids = random_ids(config, 1, LENGTH)
    expected = reference.logits(ids)
    assert_agrees(graphs.run("score", ids), expected, HALF)
    cache = graphs.cache()
    assert {tensor.dtype for tensor in cache.tensors.values()} == {np.dtype(np.float16)}
    graphs.run("prefill", ids[:, :9], cache)
    found = [graphs.run("decode", ids[:, n : n + 1], cache) for n in range(9, LENGTH)]
    assert_agrees(np.concatenate(found, axis=1), expected[:, 9:], HALF)
    half = evaluate(graphs.bundle / "prefill.onnx", ids)
    assert half.dtype == np.float32
    assert_agrees(half, expected, HALF)


def test_bfloat16(tmp_path: Path) -> None:
    """No engine on a CPU computes it; ONNX's evaluator does. 8 bits instead of 11: 8 times HALF."""
    reference = Reference(make_checkpoint(tmp_path / "checkpoint", CONFIG))
    options = ExportOptions(target="tensorrt", precision="bf16")
    export_bundle(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    ids = random_ids(CONFIG, 1, LENGTH)
    found = evaluate(tmp_path / "bundle" / "prefill.onnx", ids)
    error = relative_l2(found, reference.logits(ids)).max()
    assert HALF / 4 < error <= 8 * HALF


def test_one_graph_for_prompts_and_decoding(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    quantization = Quantization(block_size=32, int8_prefill=True)
    options = ExportOptions(target="tensorrt", precision="int4", quantization=quantization)
    with pytest.raises(RequestError, match="--int8-prefill was given with target tensorrt"):
        export_bundle(str(checkpoint), tmp_path / "bundle", options)


def narrow_scores(source: Path, path: Path) -> Path:
    """The naive form: attention on float16 as it lies in the cache."""
    model = onnx.load(str(source), load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}

    def widening(name: str) -> onnx.NodeProto:
        while made[name].op_type != "Cast":
            name = made[name].input[0]
        return made[name]

    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    for node in attentions:
        for name in node.input[:3]:
            [attribute] = widening(name).attribute
            assert attribute.i == TensorProto.FLOAT
            attribute.i = TensorProto.FLOAT16
    onnx.save(model, str(path))
    return path


def test_scores_beyond_half_precision(tmp_path: Path) -> None:
    """Unscaled scores pass 65504 while queries and keys are small: the naive form breaks."""
    config = TinyConfig(head_dim=64, num_heads=1, attention_layers=("global",))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    tensors = load_file(checkpoint / "model.safetensors")
    for part in ("q_proj", "k_proj"):
        tensors[f"transformer.h.0.attn.attention.{part}.weight"] *= 300.0
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    expected = Reference(checkpoint).logits(ids := random_ids(config, 1, LENGTH))
    bundle = export_half(checkpoint, tmp_path / "bundle")
    found = evaluate(bundle / "prefill.onnx", ids)
    assert np.isfinite(found).all()
    # Attention picks one position each; where two scores lie closer than half precision resolves
    # the queries, it may pick another, so not every position can be held to the limit.
    assert np.median(relative_l2(found, expected)) <= HALF
    naive = evaluate(narrow_scores(bundle / "prefill.onnx", bundle / "naive.onnx"), ids)
    assert not np.isfinite(naive).all()
    ours = Graphs(bundle).run("score", ids)
    assert np.median(relative_l2(ours, expected)) <= HALF


def test_types_in_half_precision() -> None:
    from neo_export.passes._wide import Wide
    from neo_export.passes.float16 import float16

    model = bound_graph("selective", CONFIG)
    for rewrite in (static_cache(LENGTH), float16(Wide())):
        apply_pass(rewrite, model)
    for node in nodes_of(model, "TensorScatter"):
        assert node.outputs[0].dtype == ir.DataType.FLOAT16
    for node in nodes_of(model, "Attention"):
        kinds = {value.dtype for value in node.inputs[:3] if value is not None}
        assert kinds == {ir.DataType.FLOAT}


def test_the_2048th_position(tmp_path: Path) -> None:
    """The published length and window: a prompt in chunks, then decoding to the very last slot."""
    config = TinyConfig(max_position_embeddings=2048, window_size=256)
    reference = Reference(make_checkpoint(tmp_path / "checkpoint", config))
    options = ExportOptions(target="tensorrt")
    export_bundle(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    graphs, ids = Graphs(tmp_path / "bundle"), random_ids(config, 1, 2048)
    expected = reference.logits(ids)
    assert_agrees(graphs.run("score", ids), expected, LIMIT)
    cache = graphs.cache()
    for start, end in ((0, 255), (255, 258), (258, 2043)):
        found = graphs.run("prefill", ids[:, start:end], cache)
        assert_agrees(found, expected[:, end - 1 : end], LIMIT)
    found = [graphs.run("decode", ids[:, n : n + 1], cache) for n in range(2043, 2048)]
    assert_agrees(np.concatenate(found, axis=1), expected[:, 2043:], LIMIT)
    with pytest.raises(Exception, match=r"TensorScatter|[Ii]ndices|out of"):
        graphs.run("decode", ids[:, :1], cache)
