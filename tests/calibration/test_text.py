"""Which token ids calibration sees."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.models import DEMO
from neo_calibration.text import read_text
from neo_export.checkpoint.folder import open_checkpoint
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["Once upon a time there was a cat. " * 30, "The dog ran."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return shutil.copytree(DEMO, tmp_path / "model")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


def ids_of(folder: Path, documents: Path) -> list[int]:
    with open_checkpoint(folder) as checkpoint:
        text = read_text([documents], checkpoint, tokens=4096, max_length=None)
    return [int(i) for i in np.concatenate(text.contexts)]


def test_what_a_training_run_left_in_the_tokenizer_counts_for_nothing(
    folder: Path, documents: Path
) -> None:
    expected = ids_of(folder, documents)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, second = (tokenizer.encode(text).ids for text in TEXTS)
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    assert expected == [*first, end, *second]
    tokenizer.enable_truncation(48)
    tokenizer.enable_padding(length=512, pad_id=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert ids_of(folder, documents) == expected


def test_documents_are_joined_by_an_id_that_the_model_has(folder: Path, documents: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    end = config["eos_token_id"]
    expected = ids_of(folder, documents)
    assert expected.count(end) == 1
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 50256}))
    assert ids_of(folder, documents) == [i for i in expected if i != end]
