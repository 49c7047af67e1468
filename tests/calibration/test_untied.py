"""A head of its own: the table of tokens then has one reader, which wants its rows."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from helpers.models import DEMO
from neo_calibration.cli import main as calibrate
from neo_export.exporter import ExportOptions, export_bundle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its own head, and statistics beside it."""
    import torch
    from transformers import GPTNeoForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    model = GPTNeoForCausalLM.from_pretrained(DEMO)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(1.01 * model.lm_head.weight.detach())
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / "model" / name)
    text = ["--text", str(DEMO / "heldout.jsonl"), "--tokens", "2048"]
    assert calibrate([str(folder / "model"), *text, "-o", str(folder / "statistics")]) == 0
    return folder


@pytest.mark.parametrize(
    ("target", "precision"), [("cpu", "int8"), ("cpu", "int4"), ("cuda", "int8"), ("cuda", "int4")]
)
def test_its_table_is_a_weight_like_all(
    untied: Path, target: str, precision: str, tmp_path: Path
) -> None:
    statistics = untied / "statistics"
    options = ExportOptions(target=target, precision=precision, calibration=statistics, verify=True)
    summary = export_bundle(str(untied / "model"), tmp_path / "bundle", options)
    assert summary.verification is not None
    graphs = [path.stat().st_size for path in (tmp_path / "bundle").glob("*.onnx")]
    assert len(graphs) == 3
    assert max(graphs) < 100_000
    # Twelve times the width squared in each of four layers, and both tables.
    numbers = 4 * 12 * 192**2 + 2 * 4096 * 192
    assert summary.weight_bytes > numbers // (1 if precision == "int8" else 2)
