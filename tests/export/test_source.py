"""What a bundle says of where it comes from: the content, not names and places."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from helpers.models import DEMO, TinyConfig, make_checkpoint
from neo_calibration.cli import main as calibrate
from neo_export.checkpoint.fingerprint import checkpoint_fingerprint
from neo_export.checkpoint.folder import open_checkpoint
from neo_export.command.cli import main as export
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.targets import Quantization
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.bundle.manifest import Manifest, Source
from neo_runtime.command.verify import main as verify
from neo_tools.diff.cli import main as diff

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def source_of(bundle: Path) -> Source:
    source = open_bundle(bundle).manifest.source
    assert source is not None
    return source


def test_the_checkpoint_wherever_it_lies(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "one", TinyConfig())
    shutil.copytree(checkpoint, tmp_path / "copy")
    other = make_checkpoint(tmp_path / "other", TinyConfig(), seed=5)
    for name in ("one", "copy", "other"):
        export_bundle(str(tmp_path / name), tmp_path / f"{name}-bundle")
    found = {name: source_of(tmp_path / f"{name}-bundle") for name in ("one", "copy", "other")}
    assert found["one"] == found["copy"] != found["other"]
    with open_checkpoint(other) as opened:
        assert found["other"].checkpoint == checkpoint_fingerprint(opened)
    manifests = [(tmp_path / f"{name}-bundle" / "neo.json").read_bytes() for name in found]
    assert manifests[0] == manifests[1]


def test_how_matrices_are_stored(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    quantization = Quantization(block_size=32, keep=("*.c_proj.weight",), int8_prefill=True)
    export_bundle(str(DEMO), bundle, ExportOptions(precision="int4", quantization=quantization))
    found = source_of(bundle)
    # Six matrices a layer in four layers, and the table.
    assert found.decode_weights == {"fp32": 4, "int4:32": 21}
    assert found.prefill_weights == {"fp32": 4, "int8": 21}
    assert found.calibration_text is None


def test_an_older_bundle_says_nothing(tmp_path: Path) -> None:
    export_bundle(str(DEMO), tmp_path / "bundle")
    path = tmp_path / "bundle" / "neo.json"
    new = Manifest.from_json(path.read_text())
    raw = json.loads(path.read_text())
    del raw["source"], raw["checksum"]
    from neo_runtime.bundle.manifest import _checksum

    path.write_text(json.dumps(raw | {"checksum": _checksum(raw)}))
    old = open_bundle(tmp_path / "bundle").manifest
    assert old.source is None
    assert old.digest == new.digest


def test_what_the_commands_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    assert export([str(DEMO), "-o", str(bundle), "--int4", "--block-size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "matrices: 25 in int4:64" in printed
    assert "operators" not in printed
    again = ["-o", str(bundle), "--int4", "--block-size", "64", "--force", "--verbose"]
    assert export([str(DEMO), *again]) == 0
    assert "quantize_int4 ×20 → " in capsys.readouterr().out
    source = source_of(bundle)
    assert verify([str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert f"made from a checkpoint of sha256 {source.checkpoint}" in printed
    assert "matrices 25 in int4:64" in printed
    assert verify([str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["checkpoint"] == source.checkpoint


def test_neo_diff_tells_another_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_bundle(str(DEMO), tmp_path / "bundle")
    few = ["--tokens", "40", "--decode-positions", "4", "--continuations", "0", "--report-only"]
    assert diff([str(tmp_path / "bundle"), "--reference", str(DEMO), *few]) == 0
    assert "another checkpoint" not in capsys.readouterr().err
    import torch
    from transformers import GPTNeoForCausalLM

    model = GPTNeoForCausalLM.from_pretrained(DEMO)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] += 1e-3
    other = tmp_path / "other"
    model.save_pretrained(other)
    assert diff([str(tmp_path / "bundle"), "--reference", str(other), *few]) == 0
    assert f"made from another checkpoint than {other}" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DEMO, checkpoint, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    assert export([str(checkpoint), "-o", str(tmp_path / "bundle")]) == 0
    assert "tokenizer   none: prompts are token ids" in capsys.readouterr().out
    assert export([str(DEMO), "-o", str(tmp_path / "whole")]) == 0
    assert "tokenizer " not in capsys.readouterr().out


def test_a_calibrated_bundle(tmp_path: Path) -> None:
    text = ["--text", str(DEMO / "heldout.jsonl"), "--tokens", "512"]
    assert calibrate([str(DEMO), *text, "-o", str(tmp_path / "stats")]) == 0
    options = ExportOptions(precision="int8", calibration=tmp_path / "stats")
    export_bundle(str(DEMO), tmp_path / "calibrated", options)
    export_bundle(str(DEMO), tmp_path / "rounded", ExportOptions(precision="int8"))
    found, plain = source_of(tmp_path / "calibrated"), source_of(tmp_path / "rounded")
    assert found.checkpoint == plain.checkpoint
    assert found.calibration_text is not None
    assert len(found.calibration_text) == 64
