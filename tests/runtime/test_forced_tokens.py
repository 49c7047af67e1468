"""Tokens that a grammar leaves no choice of are said without logits: the same texts, in fewer runs.

A rule that changes nothing, but might, lets every token be chosen from logits: what is compared.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.forced import assert_forced_tokens_fit
from helpers.hf_reference import heldout_texts
from helpers.models import DEMO
from neo_export.exporter import ExportOptions, export_bundle
from neo_runtime.command.generate import main
from neo_runtime.errors import RequestError
from neo_runtime.generation.feeding import feed
from neo_runtime.sampling.grammar_rule import GrammarRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from neo_runtime.model import Model

ORDER = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 12},
        "kind_of_order": {"enum": ["delivery", "delivered by hand", "pickup"]},
        "items": {"type": "array", "items": {"enum": ["bread", "brandy"]}, "maxItems": 3},
    },
    "required": ["customer_name", "kind_of_order", "items"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json_schema": ORDER},
    {"choices": ["The dog barked.", "The dog barked at the moon.", "日本語", "<|endoftext|>"]},
    {"regex": r"(The cat sat\. ){2,4}(And then|And that)? it was over, and (19|20)[0-9]{2}"},
    {"lark": 'start: "Dear " /[A-Z][a-z]{2,6}/ ", thank you very much" (" indeed")? "."'},
]


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


def unchanged(_: Any, scores: Any) -> Any:
    return scores


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_nothing_else_is_allowed(model: Model, form: dict[str, Any]) -> None:
    eos = model.manifest.model.eos_token_id
    grammar, rng, count = model.grammar(**form), np.random.default_rng(3), 0
    for _ in range(30):
        rule = GrammarRule(grammar, eos, prompt_length=1)
        said = [9]
        while not rule.is_complete(np.array(said)) and said[-1] not in eos and len(said) < 200:
            forced = rule.forced(np.array(said))
            for token in forced:
                scores = rule(np.array(said), np.zeros(4096, np.float32))
                assert np.flatnonzero(scores == 0).tolist() == [token]
                said.append(token)
            count += len(forced)
            if not rule.is_complete(np.array(said)):
                scores = rule(np.array(said), np.zeros(4096, np.float32))
                allowed = np.flatnonzero(scores == 0)
                assert len(allowed) > 1, "of one it was told"
                said.append(int(rng.choice(allowed)))
    assert count > 100


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.4, "seed": 5},
        {"do_sample": True, "top_k": 3, "top_p": 0.9, "seed": 6, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "min_new_tokens": 9},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_texts_are_those_of_logits(
    model: Model, form: dict[str, Any], options: dict[str, Any]
) -> None:
    """Alone and together, with as many draws."""
    prompts = [text[:30] for text in heldout_texts()[:5]]
    options |= {"grammar": model.grammar(**form), "max_new_tokens": 60}
    expected = model.generate(prompts, logits_processor=[unchanged], **options)
    alone = [one for prompt in prompts for one in model.generate([prompt], **options)]
    for found in (model.generate(prompts, **options), alone):
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.text for one in found] == [one.text for one in expected]
        assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
        assert sum(one.timings.forced_tokens for one in found) > 10
    assert not any(one.timings.forced_tokens for one in expected)


def test_of_a_scheduler(model: Model) -> None:
    """Requests that join and leave, some of them without a grammar; with a prefix cache as well."""
    prompts = [text[:90] for text in heldout_texts()[:12]]
    grammars = [model.grammar(**form) for form in FORMS]
    asked: list[dict[str, Any]] = [
        {"max_new_tokens": 20 + 5 * n, "seed": n, "do_sample": n % 3 > 0} for n in range(12)
    ]
    for number, options in enumerate(asked):
        if number % 5:
            options["grammar"] = grammars[number % 4]
    alone = [
        model.generate(prompt, logits_processor=[unchanged], **options)
        for prompt, options in zip(prompts, asked, strict=True)
    ]
    for size in (0, 10**8):
        with neo_runtime.Scheduler(
            model, max_batch_size=3, max_length=256, prefix_cache_bytes=size
        ) as scheduler:
            pending = [
                scheduler.submit(prompt, **options)
                for prompt, options in zip(prompts, asked, strict=True)
            ]
            found = [one.result(timeout=120) for one in pending]
        assert [one.token_ids for one in found] == [one.token_ids for one in alone]
        assert [one.text for one in found] == [one.text for one in alone]
        assert sum(one.timings.forced_tokens for one in found) > 40


def test_with_guesses(model: Model) -> None:
    options = {"grammar": model.grammar(json_schema=ORDER), "max_new_tokens": 90}
    for seed, prompt in enumerate(heldout_texts()[:4]):
        sampled = {"do_sample": seed > 1, "seed": seed} | options
        expected = model.generate(prompt[:60], logits_processor=[unchanged], **sampled)
        for drafter in (neo_runtime.PromptLookup(), neo_runtime.DraftModel(model)):
            found = model.generate(prompt[:60], drafter=drafter, **sampled)
            assert found.token_ids == expected.token_ids
            assert found.timings.forced_tokens > 15


def runs_of(model: Model, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, int]:
    """Tokens that were generated, and calls of the model behind the prompt."""
    calls: list[int] = []
    for name in ("decode_step", "prefill_step"):
        call = getattr(model, name)

        def counted(*given: Any, call: Any = call) -> Any:
            calls.append(1)
            return call(*given)

        monkeypatch.setattr(model, name, counted)
    found = model.generate("Once", **options)
    monkeypatch.undo()
    return len(found.token_ids), len(calls) - 1


def test_they_are_computed_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = model.grammar(choices=["The little dog barked at the moon all night long."])
    tokens, runs = runs_of(model, monkeypatch, grammar=grammar)
    assert tokens > 8
    assert runs == 0, "behind the first nothing is left to choose"
    order = model.grammar(json_schema=ORDER)
    tokens, runs = runs_of(model, monkeypatch, grammar=order, max_new_tokens=200)
    assert runs < tokens / 2
    tokens, runs = runs_of(
        model, monkeypatch, grammar=order, max_new_tokens=200, logits_processor=[unchanged]
    )
    assert runs == tokens - 1


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 1},
        {"logits_processor": [unchanged]},
        {"bad_words": ["zebra"]},
        {"logit_bias": {7: 1.0}},
        {"no_repeat_ngram_size": 40},
        {"suppress_tokens": [7]},
        {"sequence_bias": {(7,): 0.5}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_where_others_have_a_say(model: Model, options: dict[str, Any]) -> None:
    """Each token is chosen from logits: they are reported, or another rule may forbid it."""
    grammar = model.grammar(json_schema=ORDER)
    found = model.generate("Once", grammar=grammar, max_new_tokens=70, **options)
    assert found.timings.forced_tokens == 0
    if "logprobs" in options:
        assert len(found.logprobs or ()) == len(found.token_ids)
    plain = model.generate("Once", grammar=grammar, max_new_tokens=70)
    assert plain.timings.forced_tokens > 15


def test_one_that_is_forbidden_is_an_error(model: Model) -> None:
    grammar = model.grammar(choices=["The dog"])
    with pytest.raises(RequestError, match="forbid every token here"):
        model.generate("a", grammar=grammar, bad_words_ids=[[model.tokenizer.encode(" dog")[0]]])
    with pytest.raises(RequestError, match="forbid every token here"):
        model.generate("a", grammar=grammar, eos_token_id=model.tokenizer.encode(" dog"))


def test_limits_and_stops_within_them(model: Model) -> None:
    grammar = model.grammar(json_schema=ORDER)
    options: dict[str, Any] = {"grammar": grammar, "max_new_tokens": 80}
    whole = model.generate("Once", logits_processor=[unchanged], **options)
    for most in range(1, 14):
        found = model.generate("Once", grammar=grammar, max_new_tokens=most)
        assert (found.token_ids, found.finish_reason) == (whole.token_ids[:most], "length")
    found = model.generate("Once", stop=["mer_na"], **options)
    assert (found.text, found.stop) == ('{"custo', "mer_na")
    assert len(found.token_ids) < 9
    with model.stream("Once", **options) as stream:
        pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert [choice.token for piece in pieces for choice in piece.choices] == [*whole.token_ids]
    asked = iter(range(9))
    cut = model.generate("Once", should_stop=lambda: next(asked) == 1, **options)
    assert cut.finish_reason == "cancelled"
    assert (whole.text or "").startswith(cut.text or "-")


def test_up_to_the_last_position(model: Model) -> None:
    """A text of more than a chunk that is forced, over window and chunks; none is left over."""
    longest = model.manifest.max_length
    word = "The dog barked at the moon. "
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(word * 200)[: longest - 9]
    grammar = model.grammar(lark=f'start: "{model.tokenizer.decode(ids)}" /[a-z]+/')
    options: dict[str, Any] = {"grammar": grammar, "max_new_tokens": longest - 8}
    plain = model.generate([5] * 8, logits_processor=[unchanged], **options)
    found = model.generate([5] * 8, **options)
    assert found.token_ids == plain.token_ids
    assert len(found.token_ids) > found.timings.forced_tokens > longest - 20
    with neo_runtime.Scheduler(model, max_batch_size=2, prefix_cache_bytes=10**8) as scheduler:
        for _ in range(2):
            pending = scheduler.submit([5] * 8, **options)
            assert pending.result(timeout=120).token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("target", "precision", "tolerance"),
    [("portable", "fp32", 1e-4), ("cpu", "int8", 0.05), ("cpu", "int4", 0.05)],
)
def test_other_graphs(target: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    """Activations that are rounded to 8 bits may fall on the other side in other company."""
    bundle = tmp_path / "bundle"
    export_bundle(str(DEMO), bundle, ExportOptions(precision=precision, target=target))
    with neo_runtime.load(bundle, threads=1) as other:
        assert_forced_tokens_fit(other, tolerance)


class Fed:
    """As a row, and as the model that computes rows: what it is asked for."""

    def __init__(self, *unfed: int) -> None:
        self.rows: list[Any] = [TokensOf(count) for count in unfed]
        self.calls: list[Any] = []

    def prefill_step(
        self, _: Any, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None
    ) -> str:
        self.calls.append({row: [*p] for row, p in zip(rows or [0], prompts, strict=True)})
        return "prefill"

    def decode_step(self, _: Any, tokens: Sequence[int]) -> str:
        self.calls.append([*tokens])
        return "decode"

    def feed(self, most: int) -> Any:
        self.calls = []
        return feed(self, None, self.rows, most), self.calls  # type: ignore[arg-type]


class TokensOf:
    def __init__(self, count: int) -> None:
        self.unfed = list(range(count))

    def next_tokens(self, most: int) -> list[int]:
        tokens, self.unfed = self.unfed[:most], self.unfed[most:]
        return tokens


def test_who_runs_ahead() -> None:
    alone = Fed(5)
    assert alone.feed(3) == ("prefill", [{0: [0, 1, 2]}])
    assert alone.feed(3) == ("prefill", [{0: [3, 4]}])
    assert Fed(1).feed(3) == ("decode", [[0]])
    three = Fed(1, 7, 6)
    assert three.feed(100) == ("decode", [{1: [0, 1, 2, 3, 4, 5]}, [0, 6, 0]])
    assert [row.unfed for row in three.rows] == [[], [], [1, 2, 3, 4, 5]]
    both = Fed(9, 9)
    assert both.feed(11) == ("decode", [{0: [*range(8)]}, [8, 0]]), "at most 11 beside the step"
    assert Fed(9, 9).feed(16) == ("decode", [{0: [*range(8)], 1: [*range(8)]}, [8, 8]])
    assert Fed(30, 2).feed(8)[1] == [{0: [*range(8)]}, [8, 0]], "as much as may be"


def test_the_command(
    model: Model, mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(ORDER))
    flags = ["--json-schema", str(tmp_path / "schema.json"), "--max-new-tokens", "90"]
    assert main([str(mini_bundle), "Once", *flags, "--json", "--timings"]) == 0
    printed = capsys.readouterr()
    [found] = json.loads(printed.out)["completions"]
    count = found["timings"]["forced_tokens"]
    assert count > 15
    assert f", {count} of them forced" in printed.err
    alone = model.generate("Once", grammar=model.grammar(json_schema=ORDER), max_new_tokens=90)
    assert found["text"] == alone.text
