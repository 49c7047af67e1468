"""Bundles for CUDA, on the CPU provider: every precision against PyTorch, and what they add.

float16 over every position, window and head size is in `test_float16.py`. bfloat16 has no kernels
on the CPU, so its graphs run here with their bfloat16 tensors widened to float32.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.models import DEMO, Reference, TinyConfig, make_checkpoint, random_ids
from helpers.running import Graphs, assert_agrees, session_options
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.command.cli import main
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.gpt_neo.graphs import GRAPH_NAMES
from neo_export.quantize.quantizer import EightBits
from neo_export.quantize.stored import StoredWeights
from neo_export.targets import TARGETS, Quantization
from neo_export.tolerances import TOLERANCES
from neo_runtime.bundle.manifest import CANDIDATE_OUTPUTS, Manifest
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LIMIT = TOLERANCES["fp16"].logits
LENGTH = 140  # twice the window, and some


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(11).integers(0, 4096, (1, LENGTH), dtype=np.int64)


def _stored_reference(precision: str, model: Path = DEMO) -> Reference:
    """PyTorch with the weights that the bundle stores, in float32."""
    import torch

    reference = Reference(model)
    with open_checkpoint(model) as checkpoint, torch.no_grad():
        plan = Quantization().plan_for("score", precision, checkpoint.spec)
        stored = StoredWeights(lambda name: checkpoint.tensors[name].read(), plan, EightBits())
        for name, parameter in reference.model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(stored(name))))
    return reference


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_alone_are_quantized(
    precision: str, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """Against PyTorch on the stored weights: nothing but half precision is left."""
    options = ExportOptions(target="cuda", precision=precision)
    export_bundle(str(DEMO), tmp_path / "bundle", options)
    expected = _stored_reference(precision).logits(ids)
    graphs = Graphs(tmp_path / "bundle")
    assert_agrees(graphs.run("score", ids), expected, LIMIT)
    cache = graphs.cache()
    assert all(tensor.dtype == np.float16 for tensor in cache.tensors.values())
    found = [graphs.run("prefill", ids[:, :60], cache)]
    found += [graphs.run("decode", ids[:, n : n + 1], cache) for n in range(60, LENGTH)]
    assert_agrees(np.concatenate(found, axis=1), expected[:, 59:], LIMIT)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_an_odd_vocabulary_is_padded_for_the_head(precision: str, tmp_path: Path) -> None:
    config = TinyConfig(vocab_size=61)
    model = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(model), tmp_path / "b", ExportOptions(target="cuda", precision=precision))
    graphs = {name: ir.load(tmp_path / "b" / f"{name}.onnx").graph for name in GRAPH_NAMES}
    for graph in graphs.values():
        tables = [v for n, v in graph.initializers.items() if n.startswith("transformer.wte")]
        assert {table.shape[0] for table in tables if table.shape} == {64}
        assert all(not table.const_value.numpy()[61:].any() for table in tables)  # type: ignore[union-attr]
        assert [value.shape[-1] for value in graph.outputs if value.name == "logits"] == [61]  # type: ignore[index]
    if precision == "bf16":  # has no kernels here
        return
    ids = random_ids(config, 2, 40)
    expected = (
        Reference(model) if precision == "fp16" else _stored_reference(precision, model)
    ).logits(ids)
    assert_agrees(Graphs(tmp_path / "b").run("score", ids), expected, LIMIT)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_no_bias_is_a_kernel_of_its_own(precision: str, tmp_path: Path) -> None:
    """onnxruntime folds those behind the products of float16 alone."""
    options = ExportOptions(target="cuda", precision=precision)
    export_bundle(str(DEMO), tmp_path / "bundle", options)
    for name in GRAPH_NAMES:
        graph = ir.load(tmp_path / "bundle" / f"{name}.onnx").graph
        sums = [node for node in graph if node.op_type == "Add"]
        assert not [node for node in sums if any(v and v.is_initializer() for v in node.inputs)]
        assert len(sums) == 1  # NaN for a mask that cannot be honoured


def test_nodes_carry_no_notes_but_ours(cuda_bundle: Path) -> None:
    for name in GRAPH_NAMES:
        nodes = onnx.load(str(cuda_bundle / f"{name}.onnx"), load_external_data=False).graph.node
        keys = [note.key for node in nodes for note in node.metadata_props]
        assert keys == 8 * ["neo.sum"]
        assert not any(node.doc_string for node in nodes)


def test_calibrated_weights_are_verified_as_stored(tmp_path: Path) -> None:
    """GPTQ's integers are read back from the graph, whose scales are in half precision."""
    with (DEMO / "heldout.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][400:404]
    (tmp_path / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    command = ["-o", str(tmp_path / "bundle"), "--int4", "--target", "cuda", "--verify"]
    assert main([*command, "--calibrate-text", str(tmp_path / "text.txt")]) == 0


def _widened(path: Path) -> Any:
    """A session of the graph with float32 wherever it has bfloat16."""
    model = ir.load(path)
    for value in [
        *model.graph.inputs,
        *(output for node in model.graph for output in node.outputs),
    ]:
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16:
            assert value.const_value is not None
            wide = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.const_value, value.type = wide, ir.TensorType(ir.DataType.FLOAT)
    data = ir.serde.serialize_model(model).SerializeToString()
    return __import__("onnxruntime").InferenceSession(
        data, session_options(optimize=False), providers=["CPUExecutionProvider"]
    )


def test_bfloat16_has_the_same_graphs_over_rounded_weights(
    ids: NDArray[np.int64], tmp_path: Path
) -> None:
    import torch

    bundle = tmp_path / "bundle"
    export_bundle(str(DEMO), bundle, ExportOptions(target="cuda", precision="bf16"))
    manifest = Manifest.from_json((bundle / "neo.json").read_text())
    assert manifest.cache.dtype == "bfloat16"
    stored = onnx.load(str(bundle / "score.onnx"), load_external_data=False).graph.initializer
    kinds = {tensor.data_type for tensor in stored if tensor.data_location == tensor.EXTERNAL}
    assert kinds == {onnx.TensorProto.BFLOAT16}
    reference = Reference(DEMO)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    session = _widened(bundle / "score.onnx")
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(LENGTH)[None],
    }
    for tensor in manifest.graphs["score"].inputs[3:]:
        shape = (1, tensor.shape[1], 0, tensor.shape[3])
        feeds[tensor.name] = np.zeros(shape, dtype=np.float32)
    [found] = session.run(["logits"], feeds)
    assert_agrees(found, reference.logits(ids), TOLERANCES["fp32"].logits)


def test_bfloat16_cannot_be_verified_here(tmp_path: Path) -> None:
    options = ExportOptions(target="cuda", precision="bf16", verify=True)
    with pytest.raises(RequestError, match="no kernels for bfloat16"):
        export_bundle("no model is looked for", tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_candidates_are_those_of_the_logits(cuda_bundle: Path, ids: NDArray[np.int64]) -> None:
    graphs = Graphs(cuda_bundle)
    outputs = {tensor.name for tensor in graphs.manifest.graphs["decode"].outputs}
    assert outputs >= set(CANDIDATE_OUTPUTS)
    assert not outputs & {"logsumexp"}
    session = graphs.session("prefill")
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": np.repeat(ids[:, :9], 2, axis=0),
        "attention_mask": np.array([[1] * 9, [1] * 5 + [0] * 4]),
        "position_ids": np.tile(np.arange(9), (2, 1)),
    }
    for tensor in graphs.manifest.graphs["prefill"].inputs[3:]:
        shape = (2, tensor.shape[1], 0, tensor.shape[3])
        feeds[tensor.name] = np.zeros(shape, dtype=np.float16)
    logits, values, best, exp_sum = session.run(["logits", *CANDIDATE_OUTPUTS], feeds)
    np.testing.assert_array_equal(np.take_along_axis(logits, best, axis=2), values)
    assert (values[..., -1] >= np.sort(logits, axis=2)[..., -values.shape[2]]).all()
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=2, keepdims=True))
    np.testing.assert_allclose(exp_sum, exponentials.sum(axis=2), rtol=1e-6)
    assert (exp_sum.dtype, best.dtype, values.dtype) == (np.float64, np.int64, np.float32)


def test_full_length_caches_for_every_layer() -> None:
    """CUDA's kernel takes padded rows into window-sized caches from onnxruntime 1.32 on only."""
    with open_checkpoint(DEMO) as checkpoint:
        cache = TARGETS["cuda"].cache(checkpoint.spec, "fp16", 512)
    assert (cache.layout, cache.padding, cache.dtype, cache.window) == (
        "in_place",
        "right",
        "float16",
        None,
    )


@pytest.mark.parametrize(
    ("flags", "target"),
    [
        (["--fp16"], "cuda"),
        (["--bf16"], "cuda"),
        (["--fp16", "--target", "cpu"], "cpu"),
        (["--int8"], "cpu"),
        ([], "cpu"),
    ],
)
def test_half_precision_is_for_cuda_unless_asked(
    flags: list[str], target: str, tmp_path: Path
) -> None:
    assert main(["-o", str(tmp_path / "bundle"), *flags]) == 0
    manifest = Manifest.from_json((tmp_path / "bundle" / "neo.json").read_text())
    assert manifest.target == target
