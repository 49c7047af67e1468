"""What is read, how it is cut, and what is said about what it does not cover."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.bench_samples import model_spec
from helpers.models import DEMO
from neo_runtime.errors import RequestError
from neo_runtime.text.tokenizer import Tokenizer
from neo_tools.diff.texts import decode_segments, read_texts

if TYPE_CHECKING:
    from pathlib import Path

SPEC = model_spec(vocab_size=4096, max_position_embeddings=512, window_size=64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "tokenizer.json")


def test_a_text_is_cut_into_contexts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a cat. " * 40)
    texts = read_texts(path, tokenizer, SPEC, tokens=200, context=64)
    assert [len(ids) for ids in texts.contexts] == [64, 64, 64, 8]
    joined = np.concatenate(texts.contexts).tolist()
    assert joined == tokenizer.encode(path.read_text())[:200]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", ["text", "prompt", "content", None])
def test_json_lines_are_joined_by_the_end_of_text(
    name: str | None, suffix: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / f"some.{suffix}"
    documents = [text if name is None else {name: text} for text in ("A cat.", "A dog.")]
    path.write_text("\n".join(map(json.dumps, documents)) + "\n\n")
    [ids] = read_texts(path, tokenizer, SPEC, tokens=100, context=64).contexts
    assert ids.tolist() == [*tokenizer.encode("A cat."), 0, *tokenizer.encode("A dog.")]


def test_a_model_without_its_own_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A cat.", "A dog.")))
    expected = [tokenizer.encode("A cat."), tokenizer.encode("A dog.")]
    for eos, between in (((50256,), []), ((50256, 5), [5])):
        spec = replace(SPEC, eos_token_id=eos)
        [ids] = read_texts(path, tokenizer, spec, tokens=100, context=64).contexts
        assert ids.tolist() == [*expected[0], *between, *expected[1]]


def test_a_byte_order_mark_is_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, text in (("a.txt", "A cat."), ("a.jsonl", '{"text": "A cat."}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        [ids] = read_texts(tmp_path / name, tokenizer, SPEC, tokens=4, context=64).contexts
        assert ids.tolist()[:3] == tokenizer.encode("A cat.")


def test_the_texts_that_come_along(tokenizer: Tokenizer) -> None:
    texts = read_texts(None, tokenizer, SPEC, tokens=4096, context=512)
    assert [len(ids) for ids in texts.contexts] == [512] * 8
    assert texts.warnings == ()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "holds no text; expected at least two tokens"),
        ("empty.jsonl", b"\n\n", "holds no text"),
        ("one.txt", b"a", "holds a single token"),
        ("bad.txt", b"caf\xe9", "is not UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text":', "line 2 is not valid JSON"),
        ("other.jsonl", b'{"story": "a"}\n', "line 1 does not contain a document"),
        ("list.jsonl", b"[1]\n", "line 1 does not contain a document"),
    ],
)
def test_bad_texts(
    name: str, content: bytes, words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words):
        read_texts(tmp_path / name, tokenizer, SPEC, tokens=100, context=64)


def test_no_file_and_no_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"missing\.txt cannot be read: No such file"):
        read_texts(tmp_path / "missing.txt", tokenizer, SPEC, tokens=100, context=64)
    with pytest.raises(RequestError, match="has no tokenizer"):
        read_texts(None, None, SPEC, tokens=100, context=64)


def test_ids_of_another_models_tokenizer(tokenizer: Tokenizer) -> None:
    small = model_spec(vocab_size=100, max_position_embeddings=512, window_size=64)
    with pytest.raises(RequestError, match="use the tokenizer of this model"):
        read_texts(None, tokenizer, small, tokens=100, context=64)


@pytest.mark.parametrize(("tokens", "warns"), [(64, True), (65, False)])
def test_a_text_within_the_window(tokens: int, warns: bool, tokenizer: Tokenizer) -> None:
    [warning] = read_texts(None, tokenizer, SPEC, tokens=tokens, context=512).warnings
    assert ("nothing past the window is covered" in warning) == warns
    assert str(tokens) in warning


@pytest.mark.parametrize("positions", [1, 4, 16, 32, 256, 511, 512, 10_000, None])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 512])
def test_decoded_positions(positions: int | None, length: int) -> None:
    """Without overlap, inside the text, at its start, around the window and at its end."""
    segments = decode_segments(length, 64, positions)
    flat = [at for start, stop in segments for at in range(start, stop)]
    assert flat == sorted(set(flat))
    assert flat[0] == 0
    assert flat[-1] == length - 1
    if positions is None or positions >= length:
        assert len(flat) == length
    elif length == 512 and positions >= 16:
        assert {63, 64, 65} <= set(flat)
        assert {78, 79, 80} <= set(flat), "a local cache of 64 + 16 positions is full at 80"
        assert len(flat) == pytest.approx(positions, abs=2)


@pytest.mark.parametrize("window", [1, 2, 3, 10_000])
def test_decoded_positions_with_other_windows(window: int) -> None:
    for length in (2, 10, 64, 2048):
        for positions in (1, 5, 40):
            flat = [a for s in decode_segments(length, window, positions) for a in range(*s)]
            assert flat == sorted(set(flat))
            assert flat[0] == 0
            assert flat[-1] == length - 1


def test_decoded_positions_of_the_published_shape() -> None:
    segments = decode_segments(2048, 256, 32)
    lengths = [stop - start for start, stop in segments]
    assert sorted(lengths)[-4:] == [6, 6, 6, 6]
    assert (318, 324) in segments
    assert sum(lengths) == 32
    alone = [start for start, stop in segments if stop - start == 1]
    assert len(alone) == 8
    assert np.diff(alone).max() < 300
