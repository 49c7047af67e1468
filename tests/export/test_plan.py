"""Plans: what a file may say, and what a bundle of mixed storage is made of."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from helpers.graphs import spec_of
from helpers.models import TinyConfig, make_checkpoint
from neo_export.command.cli import main
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.gpt_neo.parameters import expected_shapes
from neo_export.quantize.plan import Storage, WeightPlan
from neo_export.targets import Quantization
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = TinyConfig()
SHAPES = expected_shapes(spec_of(CONFIG))
ATTENTION = "transformer.h.{}.attn.attention.{}_proj.weight"
TABLE = "transformer.wte.weight"


def write(path: Path, default: Any = "int8", weights: Any = None, version: Any = 1) -> Path:
    raw = {"schema_version": version, "default": default, "weights": weights or {}}
    path.write_text(json.dumps(raw))
    return path


def test_a_name_goes_before_a_pattern(tmp_path: Path) -> None:
    weights = {"*.mlp.*": "int4:16", "transformer.h.0.mlp.c_fc.weight": "fp32"}
    plan = WeightPlan.read(write(tmp_path / "plan.json", weights=weights))
    plan.check_model(SHAPES, "plan")
    assert plan.of("transformer.h.0.mlp.c_fc.weight") == Storage("fp32")
    assert plan.of("transformer.h.1.mlp.c_fc.weight") == Storage("int4", 16)
    assert plan.of(TABLE) == Storage("int8")


def test_written_and_read_again(tmp_path: Path) -> None:
    plan = WeightPlan(Storage("int4", 32), ((TABLE, Storage("int8")), ("*.1.*", Storage("fp32"))))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert WeightPlan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default": "int5"}, "'int5' is unknown, expected fp32"),
        ({"default": "int4"}, "such as int4:32"),
        ({"default": "int4:24"}, "'int4:24' is unknown"),
        ({"default": "int8:32"}, "'int8:32' is unknown"),
        ({"default": 8}, "expected a storage such as 'int8' as default"),
        ({"weights": [TABLE]}, "an object of names and storages"),
        ({"version": 2}, "has schema version 2, this neo-export reads 1"),
    ],
)
def test_what_is_no_plan(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        WeightPlan.read(write(tmp_path / "plan.json", **change))


def test_a_plan_may_have_a_default_alone(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 1, "default": "int8"}')
    assert WeightPlan.read(tmp_path / "plan.json") == WeightPlan.uniform("int8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not an object with the keys"),
        ('{"default": "int8"}', "is not an object with the keys"),
        ('{"default": "int8", "default": "int8"}', "'default' occurs twice"),
    ],
)
def test_what_is_no_file_of_a_plan(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        WeightPlan.read(tmp_path / "plan.json")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        WeightPlan.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"transformer.h.2.mlp.c_fc.weight": "int8"}, "matches no weight matrix of this model"),
        ({"transformer.wpe.weight": "int8"}, "matches no weight matrix of this model"),
        ({"*.0.*": "fp32", "*.mlp.*": "int4:16"}, "make the patterns agree"),
        ({TABLE: "fp16"}, "fp16 cannot be mixed with others"),
    ],
)
def test_a_plan_of_another_model(weights: dict[str, str], message: str, tmp_path: Path) -> None:
    """Said by the export, which leaves nothing behind."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    plan = WeightPlan.read(write(tmp_path / "plan.json", weights=weights))
    options = ExportOptions(precision="mixed", quantization=Quantization(plan=plan))
    with pytest.raises(RequestError, match=message):
        export_bundle(str(checkpoint), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_projections_that_differ_are_not_packed(tmp_path: Path) -> None:
    """And those that agree are, whatever the rest of the layer does; never those of the last."""
    config = TinyConfig(attention_layers=("global", "local", "global"))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    plan = WeightPlan(Storage("int4", 16), ((ATTENTION.format(0, "k"), Storage("int8")),))
    options = ExportOptions(precision="mixed", quantization=Quantization(plan=plan))
    summary = export_bundle(str(checkpoint), tmp_path / "bundle", options)
    for graph in summary.graphs:
        packed = [step.fired for step in graph.passes if step.name == "pack_qkv"]
        assert packed == [1]
        assert graph.operators["MatMulIntegerToFloat"] == 1
        # Layer 0: q, v; layer 1: qkv; layer 2: q, k, v; of each out, two of the MLP; the head.
        assert graph.operators["MatMulNBits"] == 16


def test_a_kept_projection_stays_float32(tmp_path: Path) -> None:
    """--keep-fp32 names what the checkpoint has, and not what a pass makes of it."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    quantization = Quantization(keep=("*.0.*.q_proj.weight",))
    options = ExportOptions(precision="int8", quantization=quantization)
    summary = export_bundle(str(checkpoint), tmp_path / "bundle", options)
    assert all(graph.operators["MatMulIntegerToFloat"] == 12 for graph in summary.graphs)


def test_bytes_of_a_plan(tmp_path: Path) -> None:
    """What the search counts is what the weight file holds, but for norms and positions."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    plans = [
        WeightPlan(Storage("int8"), ((TABLE, Storage("int4", 16)),)),
        WeightPlan(Storage("int8"), (("*.c_proj.weight", Storage("fp32")),)),
    ]
    sizes = []
    for at, plan in enumerate(plans):
        options = ExportOptions(precision="mixed", quantization=Quantization(plan=plan))
        sizes.append(export_bundle(str(checkpoint), tmp_path / f"{at}", options).weight_bytes)
    expected = plans[1].bytes_of(SHAPES) - plans[0].bytes_of(SHAPES)
    assert abs(sizes[1] - sizes[0] - expected) < 64 * len(SHAPES) + 4096 * 14  # padding


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    plan = write(tmp_path / "plan.json", weights={"*.c_fc.weight": "int4:16"})
    arguments = [str(checkpoint), "-o", str(tmp_path / "bundle"), "--plan", str(plan), "--json"]
    assert main([*arguments, "--keep-fp32", "*wte*"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["precision"] == "mixed"
    for graph in summary["graphs"]:
        assert graph["operators"]["MatMulNBits"] == 2
        assert graph["operators"]["Gemm"] == 1
    assert main([*arguments, "--force", "--block-size", "32"]) == 2
    assert (
        "--block-size cannot be combined with --plan; use it with --int4" in capsys.readouterr().err
    )


def test_a_typo_in_what_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    command = [str(checkpoint), "-o", str(tmp_path / "bundle"), "--int8", "--keep-fp32", "*c_porj*"]
    # Calibration, which takes long, does not begin: this text is none.
    (tmp_path / "text.txt").write_text("")
    for more in ([], ["--calibrate-text", str(tmp_path / "text.txt")]):
        assert main([*command, *more]) == 2
        assert "--keep-fp32: '*c_porj*' matches no weight matrix" in capsys.readouterr().err
        assert not (tmp_path / "bundle").exists()


def test_what_the_comparison_needs_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("neo_export.exporter.prepare", None)  # not reached
    assert main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--verify"]) == 2
    assert "--verify compares with PyTorch and needs the package torch" in capsys.readouterr().err
