"""What float16 cannot hold stays float32: plain float16 fails in real half arithmetic, this not.

onnxruntime on x86 computes most float16 graphs in float32, so overflow is shown by PyTorch's own
float16 and by ONNX's reference evaluator (numpy's float16) on the exported graph.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from helpers.half_arithmetic import evaluate
from helpers.models import Reference, TinyConfig, make_checkpoint, random_ids
from helpers.overflow import (
    Tensors,
    large_residual,
    large_scores,
    large_units,
    large_weight,
    overflowing,
    small_norm,
)
from helpers.running import Graphs, assert_agrees, relative_l2
from neo_calibration.collect import collect
from neo_calibration.text import CalibrationText
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.exporter import ExportOptions, ExportSummary, export_bundle
from neo_export.tolerances import TOLERANCES
from neo_runtime.errors import CheckpointError, StatisticsError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

LIMIT = TOLERANCES["fp16"].logits
CONFIG = TinyConfig(head_dim=64, num_heads=1, attention_layers=("global", "local", "global"))
CASES = {
    "units": (large_units, {"transformer.h.1.c_fc", "transformer.h.1.gelu"}),
    "weight": (large_weight, {"transformer.h.1.mlp.c_fc.bias", "transformer.h.1.gelu"}),
    "residual": (large_residual, {"transformer.embedding", "transformer.h.2.residual"}),
    "small": (small_norm, {"transformer.h.1.ln_2", "transformer.h.1.ln_2.weight"}),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint that float16 cannot hold, exported with its statistics."""

    checkpoint: Path
    statistics: Path
    reference: Reference
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    """PyTorch, float32, [1, S, V]."""


def statistics_of(checkpoint: Path, folder: Path, config: TinyConfig) -> Path:
    """Of random ids: other ones than those that are tested."""
    contexts = random_ids(config, 8, config.max_position_embeddings, seed=9)
    text = CalibrationText(
        contexts=tuple(contexts), max_length=contexts.shape[1], files={}, warnings=()
    )
    with open_checkpoint(checkpoint) as opened:
        collect(opened, text, folder)
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        source = make_checkpoint(folder / "source", CONFIG)
        change = large_scores if name == "scores" else CASES[name][0]
        checkpoint = overflowing(source, folder / "checkpoint", change)
        reference, ids = Reference(checkpoint), random_ids(CONFIG, 1, 40)
        if name not in ("scores", "small"):
            plain = Reference(source).logits(ids)
            assert relative_l2(reference.logits(ids), plain).max() < 1e-2, "the same function"
        statistics = statistics_of(checkpoint, folder / "statistics", CONFIG)
        return Case(checkpoint, statistics, reference, ids, reference.logits(ids))

    return make


def guarded(case: Case, folder: Path, target: str) -> ExportSummary:
    options = ExportOptions(target=target, precision="fp16", calibration=case.statistics)
    return export_bundle(str(case.checkpoint), folder, options)


def is_garbage(found: NDArray[Any], expected: NDArray[np.float32]) -> bool:
    return not np.isfinite(found).all() or bool(relative_l2(found, expected).max() > 10 * LIMIT)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")
def test_plain_float16_fails(name: str, cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases(name)
    assert is_garbage(case.reference.half_logits(case.ids), case.logits)
    options = ExportOptions(target="portable", precision="fp16")
    if name == "weight":
        with pytest.raises(CheckpointError, match=r"c_fc.bias.*90000.*--fp16 --calibrate-text"):
            export_bundle(str(case.checkpoint), tmp_path / "plain", options)
        return
    try:
        export_bundle(str(case.checkpoint), tmp_path / "plain", options)
    except VerificationError as error:  # onnxruntime overflows already on one token
        assert "not finite" in str(error)  # noqa: PT017
        assert "--fp16 --calibrate-text" in str(error)  # noqa: PT017
        return
    found = evaluate(tmp_path / "plain" / "score.onnx", case.ids)["logits"]
    assert is_garbage(found, case.logits)


def test_quantized_weights_around_float16(tmp_path: Path) -> None:
    """They keep no tensor in float32, so what is advised is the precision that does."""

    def silent_unit(tensors: Tensors, _: dict[str, object]) -> None:
        tensors["transformer.h.1.mlp.c_fc.bias"][0] = -9e4

    source = make_checkpoint(tmp_path / "source", CONFIG)
    checkpoint = overflowing(source, tmp_path / "checkpoint", silent_unit)
    options = ExportOptions(target="cuda", precision="int8")
    with pytest.raises(CheckpointError, match=r"c_fc.bias.*--fp16 --calibrate-text FILE.*--fp32"):
        export_bundle(str(checkpoint), tmp_path / "plain", options)
    options = replace(options, calibration=statistics_of(checkpoint, tmp_path / "stats", CONFIG))
    with pytest.raises(StatisticsError, match=r"c_fc.*export with --fp16, which keeps such"):
        export_bundle(str(checkpoint), tmp_path / "calibrated", options)
    summary = export_bundle(str(checkpoint), tmp_path / "half", replace(options, precision="fp16"))
    assert "transformer.h.1.mlp.c_fc.bias" in {tensor.name for tensor in summary.kept_wide}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_checkpoint_beyond_float32(precision: str, tmp_path: Path) -> None:
    def last_norm(tensors: Tensors, _: dict[str, object]) -> None:
        tensors["transformer.ln_f.weight"] *= np.float32(1e38)

    source = make_checkpoint(tmp_path / "source", CONFIG)
    checkpoint = overflowing(source, tmp_path / "checkpoint", last_norm)
    with pytest.raises(VerificationError, match=r"not finite.* the checkpoint itself computes"):
        export_bundle(str(checkpoint), tmp_path / "out", ExportOptions(precision=precision))


@pytest.mark.parametrize("name", CASES)
def test_the_guarded_graph_agrees(name: str, cases: Callable[[str], Case], tmp_path: Path) -> None:
    """In real half arithmetic, and in onnxruntime for every target."""
    case = cases(name)
    summary = guarded(case, tmp_path / "portable", "portable")
    assert {tensor.name for tensor in summary.kept_wide} >= CASES[name][1]
    outputs = evaluate(tmp_path / "portable" / "score.onnx", case.ids)
    assert outputs["present.0.key"].dtype == np.float16
    assert_agrees(outputs["logits"], case.logits, LIMIT)
    guarded(case, tmp_path / "cpu", "cpu")
    for target in ("portable", "cpu"):
        graphs = Graphs(tmp_path / target)
        assert_agrees(graphs.run("score", case.ids), case.logits, LIMIT)
        cache = graphs.cache()
        graphs.run("prefill", case.ids[:, :30], cache)
        steps = [graphs.run("decode", case.ids[:, n : n + 1], cache) for n in range(30, 40)]
        assert_agrees(np.concatenate(steps, axis=1), case.logits[:, 30:], LIMIT)


def wide_bytes(bundle: Path) -> float:
    """Part of the weight file that is float32."""
    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    graph = onnx.load(str(bundle / "score.onnx"), load_external_data=False).graph
    for tensor in graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            width = 4 if tensor.data_type == onnx.TensorProto.FLOAT else 2
            sizes[tensor.data_type] += width * int(np.prod(tensor.dims))
    return sizes[onnx.TensorProto.FLOAT] / sum(sizes.values())


def test_only_what_must_be_is_wide(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """The two matrices around the activation, of one layer of three."""
    guarded(cases("units"), tmp_path / "units", "portable")
    assert 0.2 < wide_bytes(tmp_path / "units") < 0.4
    summary = guarded(cases("units"), tmp_path / "again", "cpu")
    layers = {tensor.name.split(".")[2] for tensor in summary.kept_wide}
    assert layers == {"1"}
    assert all("65504" in tensor.reason for tensor in summary.kept_wide)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_wide_residual_stream_is_not_fused_with_norms(
    target: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """They would be one operator of one type; onnxruntime on x86 would not show an overflow."""
    operator = "SkipLayerNormalization"

    def fused(bundle: Path) -> int:
        graph = onnx.load(str(bundle / "decode.onnx"), load_external_data=False).graph
        return sum(node.op_type == operator for node in graph.node)

    guarded(cases("units"), tmp_path / "wide", target)
    assert fused(tmp_path / "wide") == 0
    plain = make_checkpoint(tmp_path / "model", TinyConfig())
    export_bundle(str(plain), tmp_path / "half", ExportOptions(target=target, precision="fp16"))
    assert fused(tmp_path / "half") > 0


def test_a_model_that_fits_is_left_alone(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    statistics = statistics_of(checkpoint, tmp_path / "statistics", CONFIG)
    for target in ("cpu", "portable"):
        options = ExportOptions(target=target, precision="fp16")
        plain = export_bundle(str(checkpoint), tmp_path / f"{target}-plain", options)
        options = ExportOptions(target=target, precision="fp16", calibration=statistics)
        summary = export_bundle(str(checkpoint), tmp_path / target, options)
        assert summary.kept_wide == ()
        assert summary.digest == plain.digest


def test_scores_beyond_float16(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Found, said, and never left to a fused operator that may compute them in float16."""
    case = cases("scores")

    def nearly(found: NDArray[Any]) -> None:
        error = relative_l2(found, case.logits)
        # Neighbours of 7e4 are 0.008 apart in float32: the reference itself is not exact.
        assert np.median(error) <= LIMIT
        assert error.max() <= 2 * LIMIT

    for target in ("portable", "cpu"):
        summary = guarded(case, tmp_path / target, target)
        assert summary.largest_score > 65504
        assert summary.cache_layout == "append"
        genai = json.loads((tmp_path / target / "genai_config.json").read_text())
        assert not genai["search"]["past_present_share_buffer"]
        graph = onnx.load(str(tmp_path / target / "score.onnx"), load_external_data=False).graph
        assert not [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        nearly(Graphs(tmp_path / target).run("score", case.ids))
    nearly(evaluate(tmp_path / "portable" / "score.onnx", case.ids)["logits"])
    naive = onnx.load(str(tmp_path / "portable" / "score.onnx"))
    assert _without_wide_scores(naive) == 3
    onnx.save(naive, tmp_path / "naive.onnx")
    with np.errstate(all="ignore"):
        found = evaluate(tmp_path / "naive.onnx", case.ids)["logits"]
    assert is_garbage(found, case.logits)


def _without_wide_scores(model: onnx.ModelProto) -> int:
    """Let scores be float16, as a converter would have them that knows nothing of the model."""
    changed, graph = 0, model.graph
    reads = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and reads[node.output[0]].op_type == "Where":
            changed += 1
            narrow = onnx.helper.make_node(
                "Cast", [f"{node.output[0]}.wide"], [f"{node.output[0]}.half"], to=10
            )
            back = onnx.helper.make_node("Cast", [narrow.output[0]], [node.output[0]], to=1)
            node.output[0] = narrow.input[0]
            graph.node.extend([narrow, back])
    ordered = onnx.helper.make_graph([], graph.name, graph.input, graph.output, graph.initializer)
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    pending = list(graph.node)
    while pending:
        ready = [node for node in pending if known.issuperset(node.input)]
        known.update(name for node in ready for name in node.output)
        ordered.node.extend(ready)
        pending = [node for node in pending if not known.issuperset(node.output)]
    model.graph.CopyFrom(ordered)
    return changed


def test_keys_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", CONFIG)

    def enlarge(tensors: dict[str, Any], _config: object) -> None:
        tensors["transformer.h.1.attn.attention.k_proj.weight"] *= np.float32(30000)

    checkpoint = overflowing(source, tmp_path / "checkpoint", enlarge)
    statistics = statistics_of(checkpoint, tmp_path / "statistics", CONFIG)
    options = ExportOptions(precision="fp16", calibration=statistics)
    advice = r"transformer\.h\.1\.key reaches.*65504.*--bf16 for a GPU or with --target cpu --fp32"
    with pytest.raises(StatisticsError, match=advice):
        export_bundle(str(checkpoint), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()
    options = ExportOptions(target="cuda", precision="bf16", calibration=statistics)
    assert export_bundle(str(checkpoint), tmp_path / "bundle", options).kept_wide == ()
