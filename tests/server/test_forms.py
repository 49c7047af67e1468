"""Texts of a given form over HTTP, asked for as of OpenAI and vLLM."""

from __future__ import annotations

import json
import re
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from helpers.serving import NAME
from neo_server.forms import Form

if TYPE_CHECKING:
    from helpers.serving import Served
    from neo_runtime.model import Model
    from neo_runtime.options.grammar import Grammar

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
LARK = 'start: "Tom" | "Ann"'


def check_age(text: str) -> None:
    assert 0 <= json.loads(text)["age"] <= 99


def check_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"age": [0-9]{1,2}\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\{"age": [0-9]{1,2}\}'),
        ({"structured_outputs": {"regex": "[0-9]{3}", "json": None}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": LARK}}, "Tom|Ann"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            r'\{"age": [0-9]{1,2}\}',
        ),
    ],
    ids=str,
)
def test_every_form(server: Served, client: Any, asked: dict[str, Any], pattern: str) -> None:
    """Whole and as a stream, several at once, and beside a request for any text."""
    options: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 40, "seed": 1}
    whole = client.completions.create(**options, n=3, logprobs=1, extra_body=asked)
    for choice in whole.choices:
        assert re.fullmatch(pattern, choice.text)
        assert choice.finish_reason == "stop"
        assert "".join(choice.logprobs.tokens) == choice.text
    stream = client.completions.create(**options, stream=True, extra_body=asked)
    assert "".join(event.choices[0].text for event in stream) == whole.choices[0].text
    plain = client.completions.create(**options)
    assert not re.fullmatch(pattern, plain.choices[0].text)


def test_any_object(server: Served) -> None:
    for asked in (
        {"structured_outputs": {"json_object": True}},
        {"response_format": {"type": "json_object"}},
    ):
        close = {"logit_bias": {"95": 3}}  # "}"
        status, answer, _ = server.answer({"prompt": "a", "max_tokens": 100, **asked, **close})
        assert status == 200
        [choice] = answer["choices"]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
    status, answer, _ = server.answer({"prompt": "a", "response_format": {"type": "text"}})
    assert status == 200


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"structured_outputs": "json"}, "structured_outputs is 'json', expected an object"),
        ({"structured_outputs": {}}, "one of choice, grammar, json, json_object, regex"),
        ({"structured_outputs": {"json_object": False}}, "expected an object with one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "expected an object with one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "expected an object with one of"),
        ({"structured_outputs": {"regex": "(a"}}, "regex cannot be used: .*unclosed group"),
        ({"structured_outputs": {"regex": 1}}, r"outputs\.regex cannot be used: expected text"),
        ({"structured_outputs": {"choice": []}}, r"outputs\.choice cannot be used: there are none"),
        ({"structured_outputs": {"json": {"not": {}}}}, r"outputs\.json cannot be used: .*not"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": None}}},
            "response_format is .*expected the type",
        ),
        ({"response_format": {"type": "xml"}}, "response_format is .*expected the type text"),
        ({"response_format": {"type": "json_schema"}}, "response_format is .*expected the type"),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"},
            },
            "structured_outputs and response_format both constrain the text",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_honoured(server: Served, asked: dict[str, Any], message: str) -> None:
    status, answer, _ = server.answer({"prompt": "a", **asked})
    assert status == 400
    assert re.search(message, answer["error"]["message"])
    assert answer["error"]["param"] in asked
    server.wait_until_idle()


def test_one_that_is_too_hard_ends_alone(
    server: Served, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = model._grammars
    limits = compiler._library.LLParserLimits(verbose_errors=False, step_max_items=60)
    monkeypatch.setattr(compiler, "_limits", limits)
    hard = {"structured_outputs": {"grammar": 'start: s\ns: s s | "a" | "b"'}}
    fields = {"prompt": "a", "max_tokens": 60, "min_tokens": 50}
    status, answer, _ = server.answer(fields | hard)
    assert status == 400
    assert "the grammar cannot be followed" in answer["error"]["message"]
    assert server.answer(fields)[0] == 200


def test_forms_that_take_long_hold_up_only_forms(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the event loop has threads; they are compiled one after the other."""
    may_end, inside, most = threading.Event(), [0], [0]
    compiled = Form.compiled

    def slow(self: Form, model: Model) -> Grammar:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        assert may_end.wait(60)
        inside[0] -= 1
        return compiled(self, model)

    monkeypatch.setattr(Form, "compiled", slow)
    fields = {"prompt": "a", "max_tokens": 4, "structured_outputs": {"regex": "[0-9]{3}"}}
    waiting = [server.send(fields) for _ in range(40)]
    try:
        assert server.answer({"prompt": "a", "max_tokens": 2})[0] == 200
    finally:
        may_end.set()
    for connection in waiting:
        with closing(connection):
            assert connection.getresponse().status == 200
    assert most == [1]
