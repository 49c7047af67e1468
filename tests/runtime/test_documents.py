"""Which documents a file has, and which token ids they become."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import repeat

import pytest
from helpers.bench_samples import model_spec
from helpers.models import DEMO
from neo_runtime.errors import RequestError
from neo_runtime.text.documents import document_ids, read_documents
from neo_runtime.text.tokenizer import Tokenizer

SPEC = model_spec(vocab_size=4096, max_position_embeddings=512, window_size=64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "tokenizer.json")


def opened(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")


def documents(name: str, content: str | bytes, tokens: int = 100) -> list[str]:
    data = content.encode() if isinstance(content, str) else content
    return list(read_documents(opened(data), name, tokens))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "folder/a.json"])
def test_a_document_a_line(name: str) -> None:
    lines = ['"A cat."', "", '{"text": "A dog.", "prompt": "Which?"}', '{"prompt": "A hen."}']
    lines += ['{"id": 3, "content": "An \\u2028 owl."}', '"A \u2028 fox."']
    expected = ["A cat.", "A dog.", "A hen.", "An \u2028 owl.", "A \u2028 fox."]
    for end in ("\n", "\r\n"):
        assert documents(name, end.join(lines)) == expected
        assert documents(name, "\ufeff" + end.join([*lines, ""])) == expected


@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.txt", "/dev/fd/63"])
def test_any_other_file_is_one_document(name: str) -> None:
    text = '"A cat."\n\n{"text": "A dog."}\n'
    assert documents(name, text) == [text]
    assert documents(name, "\ufeff" + text.replace("\n", "\r\n")) == [text]
    assert documents(name, " \n\n") == []
    assert documents(name, "") == []


def test_no_more_is_read_than_is_wanted() -> None:
    [text] = documents("a.txt", "cat " * 1000, tokens=100)
    assert 400 <= len(text) <= 2000
    assert documents("a.txt", "cat " * 100, tokens=100) == ["cat " * 100]
    lines = read_documents(opened(b'"A cat."\n{'), "a.jsonl", 100)
    assert next(lines) == "A cat."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 text \(invalid continuation byte\)"),
        ("a.jsonl", b'"caf\xe9 au lait"', r"a\.jsonl is not UTF-8 text"),
        ("a.jsonl", b'"a"\n\n{"text":', r"a\.jsonl, line 3 is not valid JSON"),
        ("a.json", b'[\n  "a"\n]', r"a\.json, line 1 is not valid JSON"),
        ("a.jsonl", b'"a"\n{"story": "b"}', r"line 2 does not contain a document; expected"),
        ("a.jsonl", b"[1, 2]", "line 1 does not contain a document"),
        ("a.jsonl", b"null", "line 1 does not contain a document"),
        ("a.jsonl", b'{"text": null, "prompt": "a"}', "line 1 does not contain a document"),
    ],
)
def test_what_is_no_document(name: str, content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        documents(name, content)


def test_the_end_of_text_is_between_documents(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("A cat."), tokenizer.encode("A dog.")
    texts = ("", "A cat.", "", "A dog.", "")
    assert document_ids(texts, tokenizer, SPEC, 100) == [*first, 0, *second]
    assert document_ids(texts, tokenizer, SPEC, len(first) + 2) == [*first, 0, second[0]]
    for eos, end in (((50256,), []), ((50256, 5), [5])):
        spec = replace(SPEC, eos_token_id=eos)
        assert document_ids(texts, tokenizer, spec, 100) == [*first, *end, *second]


def test_no_more_documents_are_asked_for_than_are_wanted(tokenizer: Tokenizer) -> None:
    assert len(document_ids(repeat("A cat."), tokenizer, SPEC, 50)) == 50


def test_special_tokens_of_a_prompt_are_left_out(tokenizer: Tokenizer) -> None:
    raw = json.loads((DEMO / "tokenizer.json").read_bytes())
    end = tokenizer.token(0)
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": end, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end: {"id": end, "ids": [0], "tokens": [end]}},
    }
    adding = Tokenizer(json.dumps(raw).encode())
    assert adding.encode("A cat.") == [0, *tokenizer.encode("A cat.")]
    assert document_ids(["A cat."], adding, SPEC, 100) == tokenizer.encode("A cat.")


def test_ids_that_the_model_does_not_have(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"has 100 tokens; use the tokenizer of this model"):
        document_ids(["A cat."], tokenizer, replace(SPEC, vocab_size=100), 100)
