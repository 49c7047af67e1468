"""Texts of a given form: against transformers with allowed tokens, and against `re` and `json`."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.hf_reference import heldout_texts, reference_continuations, varied_prompts
from helpers.kills import fork
from neo_runtime import request_model
from neo_runtime.command.generate import main
from neo_runtime.errors import DependencyError, RequestError
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.options.grammar import _LIMITS, GrammarCompiler
from neo_runtime.sampling.grammar_rule import GrammarRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_runtime.model import Model

CHOICES = ["Once", "Once upon a time", "Only", "The dog barked.", "日本", "é", '"a\n\\b"', "<|x|>"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "date": ({"regex": r"\d{4}-\d{2}-\d{2}"}, r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "words": (
        {"lark": 'start: (/[A-Z][a-z]{1,8}/ " "){2,5} "end"'},
        r"([A-Z][a-z]{1,8} ){2,5}end",
    ),
    "lark": (
        {"lark": 'start: NUM ("+" NUM)* "=" NUM\nNUM: /[0-9]{1,3}/'},
        r"[0-9]{1,3}(\+[0-9]{1,3})*=[0-9]{1,3}",
    ),
    "choices": ({"choices": CHOICES}, "|".join(map(re.escape, CHOICES))),
}


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


def tokens_that_fit(model: Model, said: list[int], choices: list[str]) -> set[int]:
    """Tokens that may follow some others where the text is a choice, by trying all of them."""
    assert model.tokenizer is not None
    vocab = model.tokenizer._tokenizer.get_vocab(with_added_tokens=False)
    letters = bytes_of_letters()
    pieces = {token: bytes(letters[c] for c in text) for text, token in vocab.items()}
    [eos] = model.manifest.model.eos_token_id
    pieces.pop(eos, None)
    start = b"".join(pieces[token] for token in said)
    texts = [choice.encode() for choice in choices]
    rest = [text[len(start) :] for text in texts if text.startswith(start)]
    found = {t for t, piece in pieces.items() if any(r.startswith(piece) for r in rest if r)}
    return found | ({eos} if b"" in rest else set())


def bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes (Radford et al.), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def allowed_by_library(model: Model, lark: str) -> Callable[[int, int, Any], list[int]]:
    """For transformers: what llguidance allows, asked anew for each text."""
    llguidance = pytest.importorskip("llguidance")
    assert model.tokenizer is not None
    [eos] = model.manifest.model.eos_token_id
    tokenizer = llguidance.LLTokenizer(model.tokenizer.json, n_vocab=4096, eos_token=eos)

    def allowed(prompt_length: int, _: int, whole: Any) -> list[int]:
        said = whole.tolist()[prompt_length:]
        if eos in said:  # a beam that is out
            return [eos]
        matcher = llguidance.LLMatcher(tokenizer, lark, log_level=0)
        assert matcher.consume_tokens(said) or not said
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little")[:4096]).tolist()

    return allowed


def test_the_tokens_that_are_allowed(model: Model) -> None:
    """All that fit, or where only one text is possible, the tokenizer's own."""
    grammar = model.grammar(choices=CHOICES)
    rng = np.random.default_rng(2)
    for trial in range(30):
        rule = GrammarRule(grammar, model.manifest.model.eos_token_id, prompt_length=2)
        said: list[int] = []
        while not rule.is_complete(np.array([9, 9, *said])):
            scores = rule(np.array([9, 9, *said]), np.zeros(4096, np.float32))
            allowed = set(np.flatnonzero(scores == 0).tolist())
            fitting = tokens_that_fit(model, said, CHOICES)
            assert allowed
            assert allowed <= fitting
            assert len(said) or allowed == fitting, "any text is possible"
            said.append(int(rng.choice(sorted(allowed))))
            if said[-1] in model.manifest.model.eos_token_id:
                break
        assert model.tokenizer is not None
        assert model.tokenizer.decode(said) in CHOICES, trial


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.4}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
def test_the_tokens_of_transformers(model: Model, options: dict[str, Any]) -> None:
    """With `prefix_allowed_tokens_fn`; what is complete needs no end-of-sequence token here."""
    lark = FORMS["words"][0]["lark"]
    allowed, grammar = allowed_by_library(model, lark), model.grammar(lark=lark)
    [eos] = model.manifest.model.eos_token_id
    for ids in varied_prompts(4):
        [expected] = reference_continuations(
            [ids],
            prefix_allowed_tokens_fn=partial(allowed, len(ids)),
            do_sample=False,
            max_new_tokens=25,
            **options,
        )
        found = model.generate([ids], grammar=grammar, max_new_tokens=25, **options)
        assert [tuple(t for t in one.token_ids if t != eos) for one in found] == [
            tuple(t for t in tokens if t != eos) for tokens in expected
        ]


def every_way(model: Model, prompts: list[str], **options: Any) -> list[Any]:
    """The completions of each prompt: together, as streams, scheduled, and with guesses."""
    together = model.generate(prompts, **options)
    streams = [model.stream(prompt, **options) for prompt in prompts]
    assert ["".join(stream) for stream in streams] == [one.text for one in together]
    with neo_runtime.Scheduler(model, max_batch_size=2, max_length=200) as scheduler:
        pending = [scheduler.submit(prompt, **options) for prompt in prompts]
        assert [one.result(timeout=60).text for one in pending] == [one.text for one in together]
    guessed = model.generate(prompts, drafter=neo_runtime.PromptLookup(), **options)
    assert [one.text for one in guessed] == [one.text for one in together]
    return together


@pytest.mark.parametrize("name", FORMS)
def test_texts_have_the_form(model: Model, name: str) -> None:
    form, pattern = FORMS[name]
    grammar = model.grammar(**form)
    prompts = [text[:40] for text in heldout_texts()[:3]]
    texts = set()
    for seed in range(6):
        options = {"do_sample": True, "seed": seed, "temperature": 1.5, "top_k": 0}
        for one in every_way(model, prompts, grammar=grammar, max_new_tokens=60, **options):
            assert one.finish_reason == "stop"
            assert re.fullmatch(pattern, one.text), one.text
            texts.add(one.text)
    assert len(texts) > 3
    for beams in model.generate(prompts, grammar=grammar, max_new_tokens=60, num_beams=3):
        assert re.fullmatch(pattern, beams.text), beams.text


def test_json(model: Model, cuda_bundle: Path) -> None:
    def check(text: str) -> None:
        found = json.loads(text)
        assert json.dumps(found, ensure_ascii=False) == text, "no other spaces"
        assert set(found) == set(PERSON["properties"])  # type: ignore[call-overload]
        assert len(found["name"]) <= 12
        assert type(found["age"]) is int
        assert 0 <= found["age"] <= 120
        assert set(found["tags"]) <= {"a", "b"}
        assert len(found["tags"]) <= 3

    prompts = [text[:30] for text in heldout_texts()[:4]]
    options = {"max_new_tokens": 100, "do_sample": True, "seed": 3, "temperature": 1.2}
    with neo_runtime.load(cuda_bundle, backend="cpu", threads=1) as other:
        for each in (model, other):  # the other's graphs give candidates only
            for schema in (PERSON, json.dumps(PERSON)):
                grammar = each.grammar(json_schema=schema)
                for one in each.generate(prompts, grammar=grammar, **options):
                    check(one.text)
    spaced = model.grammar(json_schema=PERSON | {"x-guidance": {"whitespace_flexible": True}})
    bias = dict.fromkeys(model.encode_prompts([" ", "\n"])[0].tolist(), 20.0)
    text = model.generate("a", grammar=spaced, logit_bias=bias, max_new_tokens=12).text
    assert re.match(r"\s|{\s", text)


def test_where_it_ends(model: Model) -> None:
    """As soon as nothing may follow; at end of sequence where something may; or at a limit."""
    one = model.generate("a", grammar=model.grammar(choices=["The dog"]), max_new_tokens=30)
    assert (one.text, one.finish_reason, len(one.token_ids)) == ("The dog", "stop", 2)
    exact = model.generate("a", grammar=model.grammar(choices=["The dog"]), max_new_tokens=2)
    assert (exact.text, exact.finish_reason) == ("The dog", "stop")
    cut = model.generate("a", grammar=model.grammar(choices=["The dog"]), max_new_tokens=1)
    assert (cut.text, cut.finish_reason) == ("The", "length")
    [eos] = model.manifest.model.eos_token_id
    grammar = model.grammar(regex="(The )+")
    options: dict[str, Any] = {"grammar": grammar, "logit_bias": {eos: 50.0}}
    ended = model.generate("a", max_new_tokens=9, **options)
    assert (ended.text, ended.token_ids[-1], ended.finish_reason) == ("The ", eos, "stop")
    longer = model.generate("a", max_new_tokens=9, min_new_tokens=6, **options)
    assert len(longer.token_ids) >= 6
    assert re.fullmatch("(The )+", longer.text or "")
    endless = model.generate("a", max_new_tokens=9, ignore_eos=True, **options)
    assert (len(endless.token_ids), endless.finish_reason) == (9, "length")
    assert eos not in endless.token_ids
    other = model.generate(
        "a", max_new_tokens=9, eos_token_id=[7], grammar=grammar, logit_bias={7: 50.0}
    )
    assert other.token_ids[-1] == 7
    stopped = model.generate("a", grammar=model.grammar(choices=["The dog"]), stop="do")
    assert (stopped.text, stopped.stop) == ("The ", "do")


def test_the_end_is_no_text(model: Model) -> None:
    """A token that ends a text ends no half of one; it may be missed, too."""
    [newline] = model.encode_prompts(["\n"])[0].tolist()
    grammar = model.grammar(choices=["a\nb", "a b"])
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1}):
        found = model.generate("x", grammar=grammar, eos_token_id=[0, newline], **options)
        assert (found.text or "").removesuffix("\n") == "a b", "beams end with one"
        assert found.finish_reason == "stop"
    with pytest.raises(RequestError, match="forbid every token here; relax grammar"):
        model.generate("x", grammar=model.grammar(choices=["a\nb"]), eos_token_id=newline)


def test_special_tokens_are_no_text(model: Model) -> None:
    """Text that looks like one is written with other tokens."""
    [eos] = model.manifest.model.eos_token_id
    for form in (
        {"choices": ["The <|endoftext|> b"]},
        {"regex": r"The <\|endoftext\|> [b]"},
        {"lark": 'start: "The " "<|endoftext|>" " b"'},
    ):
        for prompt in ("a", "Once"):
            found = model.generate(prompt, grammar=model.grammar(**form), max_new_tokens=60)
            assert (found.text, found.finish_reason) == ("The <|endoftext|> b", "stop")
            assert eos not in found.token_ids
    bias = {eos: 99.0}
    found = model.generate("a", grammar=model.grammar(regex=".{9}"), logit_bias=bias)
    assert len(found.text or "") == 9


@pytest.mark.parametrize("is_special", [True, False])
def test_tokens_that_were_added(model: Model, is_special: bool) -> None:
    """More than the model has; what they look like is text as well."""
    assert model.tokenizer is not None
    contents = json.loads(model.tokenizer.json)
    like = contents["added_tokens"][0]
    contents["added_tokens"] += [
        like | {"id": 4096 + n, "content": f"<tag{n}>", "special": is_special} for n in range(40)
    ]
    compiler = GrammarCompiler(json.dumps(contents), 4096)
    rule = GrammarRule(compiler.compile(choices=["a <tag3> b"]), (), prompt_length=0)
    said: list[int] = []
    while not rule.is_complete(np.array(said, np.int64)):
        scores = rule(np.array(said, np.int64), np.zeros(4096, np.float32))
        said.append(int(scores.argmax()))
    assert model.tokenizer.decode(said) == "a <tag3> b"


def test_a_limit_that_is_the_end(model: Model) -> None:
    grammar = model.grammar(choices=["The dog"])
    for options in ({}, {"num_beams": 2}):
        found = model.generate("Once", grammar=grammar, max_new_tokens=2, **options)
        assert (found.text, found.finish_reason) == ("The dog", "stop")


def test_any_mapping_is_a_schema(model: Model) -> None:
    inner = MappingProxyType({"enum": ["x"]})
    schema = MappingProxyType({"type": "array", "items": inner, "minItems": 1, "maxItems": 1})
    assert model.generate("a", grammar=model.grammar(json_schema=schema)).text == '["x"]'


def test_options_with_one_are_copied(model: Model) -> None:
    grammar = model.grammar(choices=["The dog"])
    options = model.options(grammar=grammar)
    assert copy.deepcopy(options) == options
    assert dataclasses.asdict(options)["grammar"] is grammar
    with pytest.raises(TypeError, match="a Grammar belongs to a loaded model"):
        pickle.dumps(options)


def test_a_tokenizer_of_another_kind(model: Model) -> None:
    assert model.tokenizer is not None
    contents = json.loads(model.tokenizer.json)
    contents["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}
    with pytest.raises(RequestError, match="cannot be used with the bundle's tokenizer"):
        GrammarCompiler(json.dumps(contents), 4096)


def test_threads_that_make_the_first_at_once(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_begin = threading.Barrier(3)

    class Slow(GrammarCompiler):
        def __init__(self, *arguments: Any) -> None:
            all_begin.wait(timeout=60)
            super().__init__(*arguments)

    monkeypatch.setattr(request_model, "GrammarCompiler", Slow)
    with neo_runtime.load(mini_bundle, threads=1) as other, ThreadPoolExecutor(3) as threads:

        def ask(text: str) -> str | None:
            return other.generate("a", grammar=other.grammar(choices=[text])).text

        assert list(threads.map(ask, ["x", "y", "z"])) == ["x", "y", "z"]


@pytest.mark.parametrize(
    "form",
    [
        {"lark": "start: " + " ".join("x?" for _ in range(25_000)) + ' "b"\nx: "a"'},
        {"lark": "start: " + " ".join("x?" for _ in range(2_000)) + ' "b"\nx: "a"'},
        {"lark": "start: a\na: " + " | ".join(f"/.{{1,{n}}}/ a" for n in range(1, 400)) + ' | "z"'},
        {"regex": "(a{1000}){1000}"},
    ],
    ids=["nullable", "less", "overlapping", "large"],
)
def test_one_that_would_hold_up_others(model: Model, form: dict[str, str]) -> None:
    """Is refused, or ends its request at the first token: without limits it takes seconds."""
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "seed": 1}
    with pytest.raises(RequestError, match=r"cannot be (used|followed)"):
        model.generate("a", grammar=model.grammar(**form), **options)


def test_its_first_step_is_tried_when_it_is_made(model: Model) -> None:
    """In the thread that asks for it, not in that of a scheduler."""
    many = "start: " + " ".join("x?" for _ in range(2_000)) + ' "b"\nx: "a"'
    with pytest.raises(RequestError, match=r"lark cannot be used: .*Too many items"):
        model.grammar(lark=many)


def test_large_schemas_are_within_the_limits(model: Model) -> None:
    inner = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(10)}}
    inner |= {"required": [*inner["properties"]], "additionalProperties": False}
    for schema in (
        {"type": "object", "properties": {f"f{n}": inner for n in range(60)}},
        {"type": "object", "properties": {f"f{n}": {"type": "string"} for n in range(200)}},
        {"enum": [f"word number {n}" for n in range(5000)]},
        {"type": "array", "items": {"type": "number"}, "maxItems": 1000},
    ):
        grammar = model.grammar(json_schema=schema)
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "seed": 2}
        model.generate("a", grammar=grammar, max_new_tokens=60, **options)


def test_threads_share_one(model: Model) -> None:
    grammar = model.grammar(json_schema=PERSON)
    alone = [model.generate("a", grammar=grammar, do_sample=True, seed=s).text for s in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(
            lambda s: model.generate("a", grammar=grammar, do_sample=True, seed=s).text, range(8)
        )
        assert list(found) == alone


def test_a_forked_child_may_use_it(model: Model) -> None:
    grammar = model.grammar(choices=["yes", "no"])

    def child() -> None:
        assert model.generate("a", grammar=grammar).text in ("yes", "no")

    pid = fork(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_that_was_forked_off_while_it_was_used(model: Model) -> None:
    """Copies share a lock in the library, which nobody releases in the child."""
    grammar = model.grammar(regex="[a-z ]{5,20}")
    has_ended = threading.Event()

    def use() -> None:
        while not has_ended.is_set():
            grammar.matcher().compute_bitmask()

    def child() -> None:
        signal.alarm(20)
        for _ in range(3):
            grammar.matcher().compute_bitmask()

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    try:
        statuses = [os.waitpid(fork(child), 0)[1] for _ in range(12)]
    finally:
        has_ended.set()
        for user in users:
            user.join()
    assert statuses == [0] * 12


def test_one_that_is_used_without_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts fill a table that copies share, up to a limit for each: they do not share the limit."""
    compiler = model._grammars
    assert compiler is not None
    limits = {**_LIMITS, "max_lexer_states": 300}
    monkeypatch.setattr(compiler, "_limits", compiler._library.LLParserLimits(**limits))
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 40}
    form = {"regex": "[ab]*a[ab]{16}c"}
    seeds = range(20)
    alone = [
        model.generate("x", grammar=model.grammar(**form), seed=n, **options).text for n in seeds
    ]
    grammar, compiled = model.grammar(**form), []
    compile_source = GrammarCompiler.compiled

    def counted(self: GrammarCompiler, source: str) -> Any:
        compiled.append(source)
        return compile_source(self, source)

    monkeypatch.setattr(GrammarCompiler, "compiled", counted)
    found = [model.generate("x", grammar=grammar, seed=n, **options).text for n in seeds]
    assert found == alone
    assert 2 <= len(compiled) < 16, "two now and then, not one for each text"
    # Side by side they fill it in the middle of each other's texts.
    together = model.generate(["x"] * 20, grammar=grammar, seed=tuple(seeds), **options)
    assert [one.text for one in together] == alone


LONG_OF_A_FEW_LINES = "start: T13\nT0: /\\w?/\n" + "\n".join(
    f"T{i + 1}: T{i} T{i}" for i in range(13)
)
"""To compile it takes a minute and 3 GB."""


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "a grammar of nothing; give one of json_schema, regex, choices, lark"),
        ({"regex": "a", "lark": "start: /a/"}, "a grammar of regex, lark; give one of"),
        ({"regex": "(a"}, "regex cannot be used: .*unclosed group"),
        ({"regex": 3}, "regex cannot be used: expected text, found int"),
        ({"regex": "a" * 10_001}, "regex has 10001 characters, expected at most 10000"),
        ({"choices": []}, "choices cannot be used: there are none"),
        ({"choices": ["a", ""]}, "choices is '', expected"),
        ({"choices": ["a", 1]}, "choices is 1, expected"),
        ({"json_schema": "{"}, "json_schema cannot be used: .*line 1 column 2"),
        ({"json_schema": "[]"}, "json_schema cannot be used: expected an object"),
        ({"json_schema": {"type": {1}}}, "json_schema cannot be used: it is not JSON"),
        ({"json_schema": {"type": "person"}}, "json_schema cannot be used: .*person"),
        ({"json_schema": {"not": {}}}, 'json_schema cannot be used: .*Unimplemented.*"not"'),
        ({"regex": "\ud800"}, "regex cannot be used: .*surrogates not allowed"),
        ({"lark": "x: /a/"}, "lark cannot be used: no start rule"),
        ({"lark": f"start: {'(' * 9000}"}, "lark cannot be used: .*too deeply nested"),
        ({"lark": LONG_OF_A_FEW_LINES}, "lark cannot be used: its terminals, .* have 81915 char"),
        ({"lark": LONG_OF_A_FEW_LINES.replace("/\\w?/", '"a"?')}, "its terminals, .* have 49149"),
        ({"lark": f"start: /{'a' * 5000}/ x\nx: /{'b' * 5000}/"}, "have 10004 characters"),
        ({"lark": 'start: %json {"pattern": "' + "a" * 9990 + '"}'}, "have 10012 characters"),
        ({"lark": "start: A\nA: B\nB: A"}, "its terminals name each other: A, B, A"),
        (
            {
                "json_schema": {
                    "items": [{"pattern": "a" * 9999}, {"patternProperties": {"ab": {}}}]
                }
            },
            "its patterns have 10001 characters, expected at most 10000",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used(model: Model, form: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        model.grammar(**form)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_schemas_that_are_nested_too_deeply(model: Model) -> None:
    # How deep is too deep is the interpreter's: 1000 levels, or what the stack has room for.
    with pytest.raises(RequestError, match=r"used: (it is nested too deeply|Expecting value)"):
        model.grammar(json_schema="[" * 99_000)
    deep: list[Any] = []
    for _ in range(500_000):
        deep = [deep]
    with pytest.raises(RequestError, match="json_schema cannot be used: it is nested too deeply"):
        model.grammar(json_schema={"enum": deep})


def test_what_does_not_go_together(model: Model, mini_bundle: Path) -> None:
    grammar = model.grammar(choices=["The dog"])
    with pytest.raises(RequestError, match=r"grammar is 'yes', expected what Model\.grammar"):
        model.generate("a", grammar="yes")
    with pytest.raises(RequestError, match="forbid every token here; relax grammar"):
        model.generate("a", grammar=grammar, suppress_tokens=list(range(1, 4096)))
    with pytest.raises(RequestError, match="beam search ends a text with a grammar by end of"):
        model.generate("a", grammar=grammar, num_beams=2, ignore_eos=True)
    with neo_runtime.load(mini_bundle, threads=1) as other:
        for _ in range(2):
            with pytest.raises(RequestError, match="the grammar is another model's"):
                other.generate("a", grammar=grammar)
            other.grammar(choices=["a"])
    with pytest.raises(RequestError, match="forced_eos_token_id would cut a text"):
        model.generate("a", grammar=grammar, forced_eos_token_id=0)
    with pytest.raises(RequestError, match="grammar"):
        GenerationOptions.from_generation_config({"grammar": "x"})


def test_one_that_cannot_be_followed_ends_its_request_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a grammar needs more work at a step than the library allows."""
    compiler = model._grammars
    limits = compiler._library.LLParserLimits(verbose_errors=False, step_max_items=60)
    monkeypatch.setattr(compiler, "_limits", limits)
    hard = model.grammar(lark='start: s\ns: s s | "a" | "b"')
    with neo_runtime.Scheduler(model, max_batch_size=2, max_length=100) as scheduler:
        other = scheduler.submit("a", max_new_tokens=40, ignore_eos=True)
        failing = scheduler.submit("a", grammar=hard, max_new_tokens=60, min_new_tokens=50)
        with pytest.raises(RequestError, match=r"the grammar cannot be followed: .+") as error:
            failing.result(timeout=60)
        assert len(other.result(timeout=60).token_ids) == 40
    assert "\n" not in str(error.value)


def test_without_what_it_needs(
    model: Model,
    mini_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with neo_runtime.load(mini_bundle, threads=1) as other:
        with pytest.raises(DependencyError, match="install neo-onnx with its extra grammar"):
            other.grammar(regex="a")
        monkeypatch.setattr(other, "tokenizer", None)
        with pytest.raises(RequestError, match="no tokenizer, so no text for a grammar"):
            other.grammar(regex="a")
    assert main([str(mini_bundle), "a", "--regex", "a"]) == 2
    assert "extra grammar" in capsys.readouterr().err


def test_the_command(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*flags: str) -> tuple[int, str, str]:
        status = main([str(mini_bundle), "a", "--max-new-tokens", "60", *flags])
        out, err = capsys.readouterr()
        return status, out, err

    schema, lark = tmp_path / "schema.json", tmp_path / "form.lark"
    schema.write_text(json.dumps(PERSON))
    lark.write_text('start: "Tom" | "Ann"')
    status, out, _ = run("--json-schema", str(schema))
    assert status == 0
    assert set(json.loads(out)) == {"name", "age", "tags"}
    assert run("--regex", "[0-9]{3}")[1].strip().isdigit()
    assert run("--choice", "yes", "--choice", "no")[1] in ("yes\n", "no\n")
    assert run("--lark", str(lark), "--num-beams", "2")[1] in ("Tom\n", "Ann\n")
    status, _, err = run("--regex", "(")
    assert status == 2
    assert err.startswith("neo-generate: regex cannot be used: ")
    assert run("--lark", str(tmp_path / "none"))[0] == 2
    with pytest.raises(SystemExit):
        run("--regex", "a", "--choice", "b")
    assert main([str(mini_bundle), "--lark", "-"]) == 2
    assert "the grammar and the prompts are to come from standard input" in capsys.readouterr().err
