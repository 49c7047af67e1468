"""A token picked from a row's best ones is the token picked from the whole row, or none is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from neo_runtime.backends.step_logits import CandidateRows, StepLogits
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.sampling.row_sampler import RowSampler
from neo_runtime.sampling.seeds import row_generator

VOCABULARY, COUNT = 600, 64


def candidates_of(logits: np.ndarray, rng: np.random.Generator, count: int = COUNT) -> StepLogits:
    """What a device would give: any of the equal logits at the edge, in any order among equals."""
    shuffled = rng.permutation(logits.size)
    best = shuffled[np.argsort(-logits[shuffled], kind="stable")][:count]
    # Its exponentials and their sum are a little off from numpy's.
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    exp_sum = exponentials.sum() * (1 + rng.uniform(-1e-6, 1e-6))
    found = CandidateRows(logits[best][None], best[None], np.array([exp_sum]))
    return StepLogits.at_hand(logits[None], found)


def rows(rng: np.random.Generator, spread: float) -> np.ndarray:
    """Logits as a float16 head gives them: many are equal, some are 0 or near the largest."""
    logits = rng.normal(-20, spread, VOCABULARY).astype(np.float16)
    if rng.random() < 0.3:
        logits[rng.integers(0, VOCABULARY, 30)] = logits.max()
    if rng.random() < 0.2:
        logits += np.float16(20)
    return logits.astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.3},
    "raising repetition": {"repetition_penalty": 0.8},
    "n-grams": {"no_repeat_ngram_size": 2},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.2},
    "raising penalties": {"presence_penalty": -0.5},
    "bias": {"logit_bias": {3: 5.0, 7: -5.0, 11: 100.0}},
    "sequence bias": {"sequence_bias": (((3,), 2.0), ((4, 5), -2.0))},
    "bad words": {"bad_words_ids": ((1,), (2, 3)), "suppress_tokens": (9, 10)},
    "eos": {"eos_token_id": (5,), "min_new_tokens": 4, "forced_eos_token_id": (5,)},
    "decay": {"eos_token_id": (5,), "exponential_decay_length_penalty": (1, 1.2)},
    "invalid": {"remove_invalid_values": True},
    "top_k": {"do_sample": True, "top_k": 20},
    "top_k of all": {"do_sample": True, "top_k": 0},
    "top_k near the edge": {"do_sample": True, "top_k": COUNT - 2},
    "top_k past the edge": {"do_sample": True, "top_k": COUNT + 3},
    "cool": {"do_sample": True, "top_k": 20, "temperature": 0.3},
    "coolest": {"do_sample": True, "top_k": 20, "temperature": 1e-4},
    "hot": {"do_sample": True, "top_k": 20, "temperature": 9.0},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "low top_p": {"do_sample": True, "top_k": 0, "top_p": 0.3},
    "no top_p": {"do_sample": True, "top_k": 0, "top_p": 0.0},
    "cool top_p": {"do_sample": True, "top_k": 0, "top_p": 0.7, "temperature": 0.5},
    "top_p of top_k": {"do_sample": True, "top_k": 20, "top_p": 0.6},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.1},
    "min_p of top_k": {"do_sample": True, "top_k": 30, "min_p": 0.02},
    "typical of top_k": {"do_sample": True, "top_k": 30, "typical_p": 0.5},
    "typical": {"do_sample": True, "top_k": 0, "typical_p": 0.5},
    "epsilon of top_k": {"do_sample": True, "top_k": 30, "epsilon_cutoff": 0.02},
    "eta of top_k": {"do_sample": True, "top_k": 30, "eta_cutoff": 0.02},
    "top_p under rules": {
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.5,
        "temperature": 0.6,
        "repetition_penalty": 1.2,
        "suppress_tokens": (1, 2, 3),
    },
    "all together": {
        "do_sample": True,
        "top_k": 25,
        "top_p": 0.8,
        "min_p": 0.01,
        "temperature": 0.7,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "no_repeat_ngram_size": 3,
        "renormalize_logits": True,
    },
    "log probabilities": {"logprobs": 3},
}
NEVER = {
    "invalid",
    "raising repetition",
    "top_k of all",
    "top_k past the edge",
    "typical",
    "log probabilities",
}
"""Cases that need the whole row every time."""


@pytest.mark.parametrize("case", CASES)
def test_the_same_token_as_from_all_logits(case: str) -> None:
    options = GenerationOptions(**CASES[case])
    rng = np.random.default_rng(sorted(CASES).index(case))
    seen: Counter[bool] = Counter()
    for trial in range(60):
        prompt = rng.integers(0, VOCABULARY, 6)
        samplers = [
            RowSampler(options, prompt, row_generator(trial, 0, 0), len(prompt) + 8)
            for _ in range(2)
        ]
        for _ in range(8):
            logits = rows(rng, spread=rng.choice([0.5, 2.0, 6.0]))
            step = candidates_of(logits, rng)
            [row], [whole] = step, StepLogits.at_hand(logits[None])
            assert samplers[0].pick(row) == samplers[1].pick(whole)
            seen[step.is_fetched] += 1
    assert seen[True] == sum(seen.values()) if case in NEVER else seen[False]


def test_most_of_the_usual_steps_need_no_logits() -> None:
    rng = np.random.default_rng(0)
    for case in ("greedy", "top_k", "cool", "repetition", "top_p of top_k", "bad words"):
        options = GenerationOptions(**CASES[case])
        fetched = 0
        for trial in range(100):
            sampler = RowSampler(options, np.array([1]), row_generator(trial, 0, 0), 9)
            step = candidates_of(rng.normal(-20, 5, VOCABULARY).astype(np.float32), rng)
            sampler.pick(next(iter(step)))
            fetched += step.is_fetched
        assert fetched == 0, case


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_candidates_that_are_no_numbers_decide_nothing(broken: float) -> None:
    step = candidates_of(np.arange(VOCABULARY, dtype=np.float32), np.random.default_rng(0))
    assert step.candidates is not None
    step.candidates.values[0, 3] = broken
    assert next(iter(step)).candidates is None


def test_ties_at_the_edge_decide_nothing() -> None:
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    step = candidates_of(logits, np.random.default_rng(0))
    sampler = RowSampler(GenerationOptions(), np.array([1]), row_generator(0, 0, 0), 9)
    assert sampler.pick(next(iter(step))).token == 0
    assert step.is_fetched


def test_taken_rows_keep_their_candidates() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, VOCABULARY)).astype(np.float32)
    found = [candidates_of(row, rng).candidates for row in logits]
    assert all(found)
    step = StepLogits.at_hand(
        logits,
        CandidateRows(
            *(np.concatenate([getattr(one, name) for one in found]) for name in ("values", "ids")),
            np.concatenate([one.exp_sums for one in found if one]),
        ),
    ).take(np.array([2, 0, 2]))
    for row, source in zip(step, (2, 0, 2), strict=True):
        assert row.candidates is not None
        assert row.candidates.ids[row.candidates.values.argmax()] == logits[source].argmax()
        np.testing.assert_array_equal(row.full(), logits[source])
    assert step.batch == 3
