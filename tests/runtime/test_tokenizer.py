"""The tokenizer of a bundle against transformers' own, on the same file."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from helpers.hf_reference import heldout_texts
from helpers.models import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st
from neo_runtime.errors import BundleDamagedError, DependencyError, RequestError
from neo_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "tokenizer.json")


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def test_ids_and_text_equal_those_of_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    texts = [
        *heldout_texts()[:100],
        "",
        " leading and trailing  ",
        "Hello<|endoftext|> world",
        "naïve café \N{SNOWMAN} \U0001f600\u200d\n\ttabs\r\n",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert tokenizer.vocab_size == len(theirs)


def test_each_token_has_the_text_that_transformers_gives(tokenizer: Tokenizer, theirs: Any) -> None:
    found = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    assert found == [theirs.decode([i]) for i in range(len(theirs))]


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_half_a_character_is_no_text(tokenizer: Tokenizer) -> None:
    for text in (json.loads('"so funny \\ud83d"'), None, b"text"):
        with pytest.raises(RequestError, match=r"is not text: (character 9 is .* surrogate|it is)"):
            tokenizer.encode(text)


def test_a_file_cannot_cut_or_pad_a_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    raw["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    raw["padding"] = {
        "strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    text = "Once upon a time there was a little dog"
    assert Tokenizer(path).encode(text) == tokenizer.encode(text)


def test_a_broken_file_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    for contents in ("", "{}", '{"version": "1.0"'):
        path.write_text(contents)
        with pytest.raises(BundleDamagedError, match=r"tokenizer\.json is not a tokenizer"):
            Tokenizer(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DependencyError, match=r"is missing; .* pip install tokenizers"):
        Tokenizer(DEMO / "tokenizer.json")


def test_a_package_that_cannot_be_loaded_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where its library finds no address space, or lacks a module of its own."""
    (tmp_path / "tokenizers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tokenizers"]:
        monkeypatch.delitem(sys.modules, name)
    for line in (
        "raise ImportError('tokenizers.abi3.so: failed to map segment from shared object')",
        "import a_module_that_is_nowhere",
    ):
        (tmp_path / "tokenizers" / "__init__.py").write_text(f"{line}  # {len(line)}\n")
        with pytest.raises(
            DependencyError, match=r"cannot be loaded \((token|No mod).*\); .*memory .* reinstall"
        ):
            Tokenizer(DEMO / "tokenizer.json")
