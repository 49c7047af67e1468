from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.reference_processors import reference_processors, reference_scores
from neo_runtime.backends.step_logits import StepLogits
from neo_runtime.errors import RequestError, VerificationError
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.sampling.row_sampler import RowSampler
from neo_runtime.sampling.seeds import row_generator
from numpy.typing import NDArray
from scipy import special, stats

if TYPE_CHECKING:
    from neo_runtime.sampling.choice import Choice

Floats = NDArray[np.float32]

PROMPT = np.array([1, 4, 1, 2])
MAX_LENGTH = 1024


def logits_of(seed: int, vocab_size: int = 24) -> Floats:
    return np.random.default_rng(seed).normal(0, 2, vocab_size).astype(np.float32)


def sampler(seed: int | None = 0, sequence_index: int = 0, **arguments: Any) -> RowSampler:
    options = GenerationOptions(**arguments)
    return RowSampler(options, PROMPT, row_generator(seed, 0, sequence_index), MAX_LENGTH)


def pick(sampler: RowSampler, logits: Floats) -> Choice:
    [row] = StepLogits.at_hand(logits[None])
    return sampler.pick(row)


def test_greedy_takes_the_largest_logit_and_the_first_of_equals() -> None:
    logits = np.array([1, 3, 2, 3], np.float32)
    assert pick(sampler(), logits) == (1, None, None)


def test_history_grows_and_holds_prompt_and_continuation() -> None:
    row = sampler()
    said = [pick(row, logits_of(i)).token for i in range(50)]
    assert said == [int(logits_of(i).argmax()) for i in range(50)]
    assert row.ids.tolist() == [*PROMPT.tolist(), *said]
    assert row.ids[len(PROMPT) :].tolist() == said


def test_the_callers_logits_are_never_changed() -> None:
    logits = logits_of(0)
    before = logits.copy()
    row = sampler(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        repetition_penalty=1.3,
        suppress_tokens=[2],
        logprobs=2,
    )
    pick(row, logits)
    np.testing.assert_array_equal(logits, before)


def test_rules_see_the_tokens_picked_before() -> None:
    row = sampler(no_repeat_ngram_size=1)
    logits = np.array([9, 8, 7, 6, 5, 4, 3], np.float32)
    # 1, 2 and 4 are in the prompt.
    assert [pick(row, logits).token for _ in range(4)] == [0, 3, 5, 6]
    with pytest.raises(RequestError, match="forbid every token"):
        pick(row, logits)


def test_greedy_equals_the_reference_rules_step_by_step() -> None:
    arguments = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
    row = sampler(**arguments, eos_token_id=(3,))
    ids = PROMPT.tolist()
    processors = reference_processors(
        {**arguments, "eos_token_id": 3, "max_new_tokens": 20}, len(ids)
    )
    for step in range(20):
        logits = logits_of(step % 3, vocab_size=9)
        expected = int(reference_scores(processors, np.array(ids), logits).argmax())
        assert pick(row, logits).token == expected
        ids.append(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_k": 0},
        {"top_k": 0, "temperature": 1.7},
        {"top_k": 6, "temperature": 0.8},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.1, "repetition_penalty": 1.3},
        {"top_k": 0, "typical_p": 0.7},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "suppress_tokens": [1, 5]},
    ],
    ids=str,
)
def test_draws_follow_the_references_distribution(arguments: dict[str, Any]) -> None:
    """Chi-square of 6000 first tokens against softmax of the scores that transformers computes."""
    arguments = {"do_sample": True, **arguments}
    logits = logits_of(11)
    processors = reference_processors({**arguments, "max_new_tokens": 5}, len(PROMPT))
    expected = special.softmax(reference_scores(processors, PROMPT, logits).astype(np.float64))
    options = GenerationOptions(**arguments)
    generator = row_generator(123, 0, 0)
    draws = [
        pick(RowSampler(options, PROMPT, generator, MAX_LENGTH), logits).token for _ in range(6000)
    ]
    counts = np.bincount(draws, minlength=logits.size)
    assert counts[expected == 0].sum() == 0
    # Tokens of fewer than 5 expected draws count as one, or chi-square would not hold.
    rare = expected * len(draws) < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * len(draws)
    used = wanted > 0
    assert stats.chisquare(observed[used], wanted[used]).pvalue > 1e-3


def test_a_draw_is_one_number_and_an_inverse_cumulative_distribution() -> None:
    # Written out for one generator, so that a seed keeps its text from release to release.
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    stream = row_generator(5, 0, 0)
    row = sampler(5, do_sample=True)
    for u in stream.random(200):
        assert pick(row, logits).token == int(np.searchsorted([0.1, 0.3, 0.6, 1.0], u, "right"))


def test_seeded_streams_are_the_same_in_every_release() -> None:
    first = [round(float(row_generator(42, 0, i).random()), 12) for i in range(3)]
    assert first == [0.916744157555, 0.467490779952, 0.071239202913]


def test_a_row_in_a_batch_draws_what_it_draws_alone() -> None:
    def draw(seed: int | tuple[int, ...] | None, prompt: int, sequence: int) -> float:
        return float(row_generator(seed, prompt, sequence).random())

    assert draw(3, 0, 1) == draw(3, 7, 1)
    assert draw(3, 0, 0) != draw(3, 0, 1)
    assert draw((8, 3), 1, 1) == draw(3, 0, 1)
    assert draw(None, 0, 0) != draw(None, 0, 0)
    # A large seed must not run into the sequence's number.
    assert draw(5 + (1 << 32), 0, 0) != draw(5, 0, 1)


def test_the_same_seed_says_the_same_and_another_does_not() -> None:
    def text(seed: int, sequence: int) -> list[int]:
        row = sampler(seed, sequence, do_sample=True, temperature=1.5)
        return [pick(row, logits_of(i)).token for i in range(20)]

    assert text(1, 0) == text(1, 0)
    assert len({tuple(text(s, i)) for s in range(3) for i in range(3)}) == 9


@pytest.mark.parametrize("count", [0, 3, 24, 99])
def test_logprobs_are_those_of_the_model_before_all_rules(count: int) -> None:
    logits = logits_of(4)
    expected = special.log_softmax(logits.astype(np.float64))
    best = int(logits.argmax())
    row = sampler(logprobs=count, suppress_tokens=[best], repetition_penalty=2.0)
    choice = pick(row, logits)
    assert choice.token != best
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-6)
    assert choice.top_logprobs is not None
    order = np.argsort(-logits, kind="stable")[:count]
    assert [t.token for t in choice.top_logprobs] == order.tolist()
    assert [t.logprob for t in choice.top_logprobs] == pytest.approx(expected[order], abs=1e-6)


def test_equal_logprobs_are_listed_by_id() -> None:
    choice = pick(sampler(logprobs=2), np.array([1, 2, 2, 2, 0], np.float32))
    assert [t.token for t in choice.top_logprobs or ()] == [1, 2]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(do_sample: bool, value: float) -> None:
    logits = logits_of(0)
    logits[3] = value
    with pytest.raises(VerificationError, match=str(value)):
        pick(sampler(do_sample=do_sample), logits)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_smallest_temperature_is_greedy(top_k: int) -> None:
    for seed in range(5):
        picked = sampler(do_sample=True, temperature=2e-38, top_k=top_k, seed=seed)
        greedy = sampler()
        for step in range(8):
            assert pick(picked, logits_of(step)).token == pick(greedy, logits_of(step)).token


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize(("temperature", "bias"), [(0.5, 3e38), (0.2, 1e38), (1e-29, 1e10)])
def test_quotients_beyond_float32(temperature: float, bias: float, top_k: int) -> None:
    options = {"do_sample": True, "top_k": top_k, "logit_bias": {7: bias}}
    assert pick(sampler(temperature=temperature, **options), logits_of(0)).token == 7


def test_forbidding_every_token_is_an_error_when_sampling() -> None:
    with pytest.raises(RequestError, match="forbid every token"):
        pick(sampler(do_sample=True, suppress_tokens=range(24)), logits_of(0))


def test_forced_eos_comes_last() -> None:
    options = GenerationOptions(forced_eos_token_id=(3,))
    row = RowSampler(options, PROMPT, row_generator(0, 0, 0), max_length=len(PROMPT) + 3)
    logits = np.array([9, 1, 1, 1, 1], np.float32)
    assert [pick(row, logits).token for _ in range(3)] == [0, 0, 3]
