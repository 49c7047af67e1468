from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
import torch
from helpers.reference_processors import tiny_model
from neo_runtime.errors import RequestError, VerificationError
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.sampling.beam_search import BeamResult, BeamSearch
from transformers import GenerationConfig, GPTNeoForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 30
PROMPT = [5, 1, 8, 2]


def next_logits(model: GPTNeoForCausalLM, rows: list[list[int]]) -> np.ndarray[Any, Any]:
    """float32 [rows, V]: the whole sequence is computed anew each time, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor(rows), use_cache=False).logits[:, -1].float()
    return np.asarray(logits.numpy())


def search(model: GPTNeoForCausalLM, options: GenerationOptions) -> list[BeamResult]:
    """Drive the state machine as its docstring says, with rows of ids in the cache's place."""
    length = options.total_length(len(PROMPT), 64)
    beams = BeamSearch(options, np.array(PROMPT), length)
    rows = [PROMPT] * options.num_beams
    step = beams.step(next_logits(model, [PROMPT]))
    while step is not None:
        parents, tokens = step
        rows = [[*rows[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
        step = beams.step(next_logits(model, rows))
    assert beams.step(np.zeros((options.num_beams, VOCAB), np.float32)) is None
    return beams.results()


def reference(model: GPTNeoForCausalLM, arguments: dict[str, Any]) -> list[BeamResult]:
    config = GenerationConfig(
        **arguments,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    prompt = torch.tensor([PROMPT])
    out = model.generate(prompt, generation_config=config, attention_mask=torch.ones_like(prompt))
    lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
    return [
        BeamResult(tuple(row[len(PROMPT) : len(PROMPT) + length].tolist()), score)
        for row, length, score in zip(
            out.sequences, lengths, out.sequences_scores.tolist(), strict=True
        )
    ]


def assert_equal_to_generate(model: GPTNeoForCausalLM, arguments: dict[str, Any]) -> int:
    """Same tokens, same scores; returns how many hypotheses ended before the length limit."""
    options = GenerationOptions.from_generation_config(arguments)
    mine, theirs = search(model, options), reference(model, arguments)
    assert [r.token_ids for r in mine] == [r.token_ids for r in theirs]
    scores = [r.score for r in mine], [r.score for r in theirs]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)
    return sum(r.token_ids[-1] in options.active_eos for r in mine)


# A negative penalty prefers short hypotheses, a large one long ones.
GRID = list(
    itertools.product((-1.0, 0.0, 0.6, 1.0, 2.0), (False, True, "never"), ((2, 1), (4, 3), (5, 5)))
)
RULES: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 4},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 1.5},
    {"renormalize_logits": True, "bad_words_ids": [[9], [5, 1]]},
    # Fewer ways to begin than beams: some of these are no candidates.
    {"begin_suppress_tokens": [token for token in range(VOCAB) if token not in (3, 7)]},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_generate(rule: dict[str, Any]) -> None:
    ended_early = 0
    for number, (length_penalty, early_stopping, (num_beams, returned)) in enumerate(GRID):
        ended_early += assert_equal_to_generate(
            tiny_model(VOCAB, seed=number % 4, scale=0.3),
            {
                "max_new_tokens": 7,
                "eos_token_id": [3, 11] if number % 3 == 0 else [3],
                "num_beams": num_beams,
                "num_return_sequences": returned,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
                **rule,
            },
        )
    assert ended_early > 10, "too few hypotheses end with end-of-sequence to test its handling"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 20])
def test_equals_generate_at_other_lengths(max_new_tokens: int) -> None:
    for eos in ([3], []):
        arguments = {"max_new_tokens": max_new_tokens, "num_beams": 4, "num_return_sequences": 4}
        # An absent eos_token_id is none at all on both sides.
        arguments |= {"eos_token_id": eos} if eos else {}
        assert_equal_to_generate(tiny_model(VOCAB, seed=2, scale=0.3), arguments)


def test_a_hypothesis_ends_where_the_caller_says() -> None:
    options = GenerationOptions(max_new_tokens=3, num_beams=2, early_stopping=True)
    seen: list[list[int]] = []

    def is_stopped(ids: np.ndarray[Any, Any]) -> bool:
        seen.append(ids.tolist())
        return int(ids[-1]) == 6

    beams = BeamSearch(options, np.array([1, 2]), 5, is_stopped)
    logits = np.full((1, 8), -5.0, np.float32)
    logits[0, [6, 7]] = 5.0, 4.0
    parents, tokens = beams.step(logits) or pytest.fail("two beams should go on")
    assert tokens[0] == 7
    assert parents.tolist() == [0, 0]
    assert [1, 2, 6] in seen
    assert beams.step(np.repeat(logits, 2, axis=0)) is None
    assert [r.token_ids for r in beams.results()] == [(6,)]


def test_equal_scores_go_to_the_lower_id() -> None:
    beams = BeamSearch(GenerationOptions(num_beams=3), np.array([0]), 9)
    parents, tokens = beams.step(np.zeros((1, 8), np.float32)) or pytest.fail("not over yet")
    assert (parents.tolist(), tokens.tolist()) == ([0, 0, 0], [0, 1, 2])


def test_dead_ends_are_left_out_of_the_results() -> None:
    # Everything but 0 and end-of-sequence is forbidden: only one hypothesis a length exists.
    options = GenerationOptions(
        num_beams=4,
        num_return_sequences=4,
        eos_token_id=(3,),
        suppress_tokens=(0, 1, 2, 4, 5),
        max_new_tokens=3,
    )
    beams = BeamSearch(options, np.array([0]), 4)
    assert beams.step(np.zeros((1, 6), np.float32)) is None
    assert [r.token_ids for r in beams.results()] == [(3,)]


def test_copies_of_a_hypothesis_are_left_out_of_the_results() -> None:
    # One first token is allowed and the last one is forced: there is one hypothesis at all.
    options = GenerationOptions(
        num_beams=3,
        num_return_sequences=3,
        begin_suppress_tokens=(1, 2, 3, 4, 5),
        forced_eos_token_id=(3,),
        max_new_tokens=2,
    )
    beams = BeamSearch(options, np.array([0]), 3)
    assert beams.step(np.zeros((1, 6), np.float32)) is not None
    assert beams.step(np.zeros((3, 6), np.float32)) is None
    assert [r.token_ids for r in beams.results()] == [(0, 3)]


@pytest.mark.parametrize("length_penalty", [-7.0, -10.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_a_penalty_that_makes_scores_smaller_than_any_limit(
    length_penalty: float, early_stopping: bool | str
) -> None:
    """Where the reference returns what is no hypothesis: its -1e9 for none counts as better."""
    options = GenerationOptions(
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=60,
        length_penalty=length_penalty,
        early_stopping=early_stopping,  # type: ignore[arg-type]
    )
    found = search(tiny_model(VOCAB, seed=1, scale=0.3), options)
    assert [len(result.token_ids) for result in found] == [60] * 3
    assert len({result.token_ids for result in found}) == 3
    assert found[0].score < -1e9
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)


def test_forbidding_every_token_is_an_error() -> None:
    options = GenerationOptions(num_beams=2, suppress_tokens=tuple(range(6)))
    with pytest.raises(RequestError, match="forbid every token"):
        BeamSearch(options, np.array([0]), 4).step(np.zeros((1, 6), np.float32))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    logits = np.zeros((1, 6), np.float32)
    logits[0, 2] = np.nan
    with pytest.raises(VerificationError, match="nan"):
        BeamSearch(GenerationOptions(num_beams=2), np.array([0]), 4).step(logits)


def test_too_many_eos_tokens_for_the_vocabulary_is_an_error() -> None:
    options = GenerationOptions(num_beams=2, eos_token_id=(0, 1, 2, 3))
    with pytest.raises(RequestError, match="fewer eos_token_id"):
        BeamSearch(options, np.array([0]), 4).step(np.zeros((1, 4), np.float32))
    # One fewer: as many are compared as there are.
    options = GenerationOptions(num_beams=2, eos_token_id=(0, 1, 2))
    beams = BeamSearch(options, np.array([0]), 4)
    beams.step(np.zeros((1, 4), np.float32))
    assert {result.token_ids for result in beams.results()} <= {(0,), (1,), (2,)}


def test_stop_strings_end_where_greedy_decoding_ends(mini_bundle: Path) -> None:
    """Over a special token between their parts; not inside a character."""
    with neo_runtime.load(mini_bundle, threads=1) as model:
        assert model.tokenizer is not None
        [eos] = model.manifest.model.eos_token_id
        [a], [b] = model.tokenizer.encode("a"), model.tokenizer.encode("b")
        emoji = model.tokenizer.encode("\U0001f600")
        assert len(emoji) > 1
        for said, stop, ends in (([a, eos, b], "ab", True), (emoji, "\ufffd", False)):
            texts = [*said, *[b] * 8]

            def only(ids: Any, scores: Any, texts: list[int] = texts) -> Any:
                forced = np.full_like(scores, -np.inf)
                forced[texts[len(ids) - 2]] = 0
                return forced

            options: dict[str, Any] = {"stop": stop, "logits_processor": [only]}
            options |= {"ignore_eos": True, "max_new_tokens": 7}
            greedy = model.generate([5, 6], **options)
            found = model.generate([5, 6], num_beams=2, **options)
            assert (found.text, found.token_ids) == (greedy.text, greedy.token_ids)
            assert (found.finish_reason, found.stop) == (greedy.finish_reason, greedy.stop)
            assert (greedy.stop is not None) == ends
