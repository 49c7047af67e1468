from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.reference_processors import reference_processors, reference_scores
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.sampling.processors import Renormalize
from neo_runtime.sampling.rules import build_processors
from neo_runtime.sampling.warpers import build_warpers
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

EOS = (3, 7)
MAX_NEW = 12


def ours(options: GenerationOptions, ids: Ints, prompt_length: int, scores: Floats) -> Floats:
    rules = build_processors(options, prompt_length, prompt_length + MAX_NEW)
    rules += build_warpers(options)
    if options.renormalize_logits:
        rules.append(Renormalize())
    scores = scores.copy()
    for rule in rules:
        scores = rule(ids, scores)
    return scores


def theirs(arguments: dict[str, Any], ids: Ints, prompt_length: int, scores: Floats) -> Floats:
    arguments = {"max_new_tokens": MAX_NEW, "eos_token_id": list(EOS), "top_k": 0, **arguments}
    return reference_scores(reference_processors(arguments, prompt_length), ids, scores)


def options_of(arguments: dict[str, Any]) -> GenerationOptions:
    """As a `generation_config.json` holds them, so that both sides read the same thing."""
    return GenerationOptions.from_generation_config({"top_k": 0, **arguments}, eos_token_id=EOS)


def random_row(
    generator: np.random.Generator, vocab_size: int, kind: str
) -> tuple[Ints, int, Floats]:
    """ids, prompt length, scores: plain, with ties everywhere, or with -inf entries."""
    prompt_length = int(generator.integers(1, 20))
    length = prompt_length + int(generator.integers(0, MAX_NEW))
    # Few different ids, so that n-grams and words do repeat.
    ids = generator.integers(0, min(vocab_size, 11), length)
    scores = generator.normal(0, 3, vocab_size).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    if kind == "-inf":
        scores[generator.random(vocab_size) < 0.4] = -np.inf
        scores[generator.integers(vocab_size)] = 1.0
    return ids, prompt_length, scores


def assert_same(mine: Floats, reference: Floats, *, ties: bool) -> None:
    if ties:
        # Which of several equal scores top_p keeps is up to an unstable sort in the reference.
        mine, reference = np.sort(mine), np.sort(reference)
    np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(reference))
    np.testing.assert_allclose(mine, reference, rtol=2e-6, atol=2e-6)


RULES: list[dict[str, Any]] = [
    {"sequence_bias": [[[1], 2.5], [[1, 2], -1.25], [[4, 5, 2], 3.0], [[2], 0.7]]},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[1], [2, 5], [0, 1, 2], [3], [7], [6, 3]]},
    {"min_length": 15},
    {"min_new_tokens": 4},
    {"min_new_tokens": 2, "min_length": 30},
    {"forced_eos_token_id": 3},
    {"forced_eos_token_id": [3, 9]},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": (2, 1.3)},
    {"suppress_tokens": [0, 5, 3]},
    {"begin_suppress_tokens": [1, 2]},
    {"renormalize_logits": True},
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "temperature": 2.5},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 10},  # all but one of 11
    {"do_sample": True, "top_k": 5000},
    {"do_sample": True, "top_p": 0.0},
    {"do_sample": True, "top_p": 0.3},
    {"do_sample": True, "top_p": 0.9},
    {"do_sample": True, "top_p": 0.9999},
    {"do_sample": True, "min_p": 0.0},
    {"do_sample": True, "min_p": 0.05},
    {"do_sample": True, "min_p": 1.0},
    {"do_sample": True, "typical_p": 0.2},
    {"do_sample": True, "typical_p": 0.95},
    {"do_sample": True, "epsilon_cutoff": 0.01},
    {"do_sample": True, "epsilon_cutoff": 0.9},
    {"do_sample": True, "eta_cutoff": 0.02},
    {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7},
]


@pytest.mark.parametrize("kind", ["plain", "ties", "-inf"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_rule_equals_transformers(rule: dict[str, Any], kind: str) -> None:
    has_changed = False
    for seed, vocab_size in [(seed, 11) for seed in range(40)] + [(40, 301), (41, 50257)]:
        row = random_row(np.random.default_rng([seed, len(kind)]), vocab_size, kind)
        reference = theirs(rule, *row)
        assert_same(ours(options_of(rule), *row), reference, ties=kind == "ties")
        has_changed |= not np.array_equal(reference, row[2], equal_nan=True)
    is_neutral = rule.get("min_p") == 0.0 or (
        rule.get("remove_invalid_values") is True and kind != "-inf"
    )
    assert has_changed or is_neutral, "the rows never show this rule at work"


CHAIN: dict[str, list[Any]] = {
    "sequence_bias": [[[[1], 2.5], [[1, 2], -1.25]]],
    "repetition_penalty": [1.3, 0.8],
    "no_repeat_ngram_size": [2, 3],
    "bad_words_ids": [[[1], [2, 5], [3]]],
    "min_length": [10],
    "min_new_tokens": [3, 6],
    "forced_eos_token_id": [7],
    "exponential_decay_length_penalty": [(1, 1.1)],
    "suppress_tokens": [[0, 5]],
    "begin_suppress_tokens": [[2, 8]],
    "do_sample": [True],
    "temperature": [0.6, 1.4],
    "top_k": [3, 40],
    "top_p": [0.5, 0.95],
    "min_p": [0.02, 0.2],
    "typical_p": [0.4, 0.9],
    "epsilon_cutoff": [0.001],
    "eta_cutoff": [0.003],
    "renormalize_logits": [True],
}


@pytest.mark.parametrize("seed", range(120))
def test_chains_equal_transformers(seed: int) -> None:
    generator = np.random.default_rng([7, seed])
    vocab_size = (11, 100, 50257)[seed % 3]
    arguments = {
        name: values[int(generator.integers(len(values)))]
        for name, values in CHAIN.items()
        if name == "do_sample" or generator.random() < 0.5
    }
    row = random_row(generator, vocab_size, ("plain", "-inf")[seed % 2])
    if vocab_size == 11:
        # Fewer tokens than rules: some chains would forbid all of them.
        arguments.pop("no_repeat_ngram_size", None)
    assert_same(ours(options_of(arguments), *row), theirs(arguments, *row), ties=False)


def test_rules_on_equal_logits() -> None:
    # Probabilities that meet a limit exactly: 1 - 0.9 is one of ten equal tokens, in float32.
    row = (np.zeros(3, np.int64), 3, np.zeros(10, np.float32))
    for rule in (
        {"do_sample": True, "top_p": 0.9},
        {"do_sample": True, "top_p": 0.5},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "top_k": 3},
        {"do_sample": True, "min_p": 1.0},
    ):
        assert_same(ours(options_of(rule), *row), theirs(rule, *row), ties=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_ngram_is_all_there_is(size: int) -> None:
    rule = {"no_repeat_ngram_size": size}
    row = (np.full(size, 4, np.int64), size, np.zeros(10, np.float32))
    reference = theirs(rule, *row)
    assert np.flatnonzero(np.isneginf(reference)).tolist() == [4]
    assert_same(ours(options_of(rule), *row), reference, ties=False)


def test_top_p_keeps_the_higher_ids_among_equals() -> None:
    scores = np.array([0, 5, 0, 5, 5], np.float32)
    kept = ours(options_of({"do_sample": True, "top_p": 0.5}), np.zeros(1, np.int64), 1, scores)
    assert np.flatnonzero(np.isfinite(kept)).tolist() == [3, 4]


def test_warpers_wait_for_do_sample() -> None:
    options = GenerationOptions.from_generation_config({"temperature": 0.5, "top_p": 0.5})
    assert build_warpers(options) == []


@pytest.mark.parametrize(
    ("presence", "frequency"), [(0.75, 0.4), (0.75, 0.0), (0.0, 0.4), (-0.75, 0.0), (0.0, -0.4)]
)
def test_penalties_of_openai_stand_where_generate_puts_its_callers_processors(
    presence: float, frequency: float
) -> None:
    """Literally: logits -= count * frequency + (count > 0) * presence, then + bias."""
    bias = {2: 3.0, 9: -np.inf, 4: -1.5}

    class Penalties:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            generated = input_ids[0, prompt_length:].tolist()
            for token in range(scores.shape[1]):
                count = generated.count(token)
                scores[0, token] -= count * frequency + float(count > 0) * presence
                scores[0, token] += bias.get(token, 0.0)
            return scores

    rules: dict[str, Any] = {
        "repetition_penalty": 1.4,
        "suppress_tokens": [5],
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 8,
    }
    options = options_of(rules).merged(
        presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    for seed in range(20):
        generator = np.random.default_rng([9, seed])
        ids, prompt_length, scores = random_row(generator, 23, "plain")
        processors = reference_processors(
            {"max_new_tokens": MAX_NEW, **rules}, prompt_length, custom=[Penalties()]
        )
        reference = reference_scores(processors, ids, scores)
        assert_same(ours(options, ids, prompt_length, scores), reference, ties=False)


def test_prompt_tokens_have_no_presence_or_frequency_penalty() -> None:
    options = GenerationOptions(presence_penalty=1.0, frequency_penalty=0.5)
    (rule,) = build_processors(options, 3, 3 + MAX_NEW)
    scores = rule(np.array([1, 1, 2, 4, 4, 2], np.int64), np.zeros(6, np.float32))
    assert scores.tolist() == [0, 0, -1.5, 0, -2, 0]


def test_invalid_values_are_removed_as_in_transformers() -> None:
    scores = np.array([np.nan, np.inf, -np.inf, 1.5, -2.0], np.float32)
    row = (np.zeros(2, np.int64), 2, scores)
    rule = {"remove_invalid_values": True}
    np.testing.assert_array_equal(ours(options_of(rule), *row), theirs(rule, *row))


def test_ignored_or_foreign_eos_does_no_harm() -> None:
    scores = np.zeros(5, np.float32)
    ids = np.zeros(2, np.int64)
    ignoring = GenerationOptions(min_new_tokens=9, eos_token_id=(3,), ignore_eos=True)
    assert build_processors(ignoring, 2, 2 + MAX_NEW) == []
    foreign = GenerationOptions(min_new_tokens=9, eos_token_id=(3, 50256))
    (rule,) = build_processors(foreign, 2, 2 + MAX_NEW)
    assert np.flatnonzero(np.isneginf(rule(ids, scores))).tolist() == [3]
