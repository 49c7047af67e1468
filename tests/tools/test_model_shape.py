"""Which checkpoints are the model of a bundle: those that the exporter reads as such."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.models import DEMO
from neo_export.checkpoint.config import read_config
from neo_runtime.errors import CheckpointError
from neo_tools.model_shape import check_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

MODEL = read_config(DEMO)
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key != name}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {}),
        (without("num_layers") | {"num_hidden_layers": 4}, {}),
        (without("num_heads") | {"num_attention_heads": 3}, {}),
        (without("num_heads"), {"num_heads": 16}),
        (without("vocab_size"), {"vocab_size": 50257}),
    ],
)
def test_the_same_model(config: dict[str, Any], changes: dict[str, int], tmp_path: Path) -> None:
    """Either name of a key, or none where transformers has a default."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_checkpoint(tmp_path, replace(MODEL, **changes))


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "hidden_size", "vocab_size"])
def test_another_model(name: str) -> None:
    other = replace(MODEL, **{name: 48})
    with pytest.raises(CheckpointError, match=r"another model than the bundle: it has 4 layers, "):
        check_checkpoint(DEMO, other)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a Hugging Face model folder"):
        check_checkpoint(tmp_path, MODEL)
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        check_checkpoint(tmp_path, MODEL)
