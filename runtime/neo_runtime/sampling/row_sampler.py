"""Picks the next token of one sequence.

A draw takes exactly one float64 u from the row's own generator (PCG64, whose stream numpy keeps
across versions) and inverts the cumulative distribution of the candidates, in ascending order of
their ids: the token is the first whose cumulative weight is above u · total. `Generator.choice`
and `multinomial` promise no stable results across numpy versions; this does what it says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from neo_runtime.errors import RequestError, VerificationError
from neo_runtime.sampling.candidates import CandidatePicker
from neo_runtime.sampling.grammar_rule import GrammarRule
from neo_runtime.sampling.processors import (
    CountPenalty,
    FloatArray,
    IntArray,
    MinLength,
    Renormalize,
    RepetitionPenalty,
)
from neo_runtime.sampling.rules import build_processors
from neo_runtime.sampling.warpers import build_warpers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.backends.step_logits import RowLogits
    from neo_runtime.options.generation_options import GenerationOptions

__all__ = [
    "Choice",
    "RowSampler",
    "TokenLogprob",
    "check_seeds",
    "overflowed",
    "row_generator",
    "usable_maximum",
    "with_logprobs",
]


_LEAVE_ONE_ALLOWED = (GrammarRule, CountPenalty, MinLength, RepetitionPenalty)
"""Rules beside which the only text token that a grammar allows is what is chosen."""


class TokenLogprob(NamedTuple):
    """A token and its natural-log probability."""

    token: int
    logprob: float


class Choice(NamedTuple):
    """The token picked at one step.

    Log probabilities are those of the model itself: log-softmax of its logits before any
    processor or warper (the convention of OpenAI and vLLM). None unless `logprobs` asks for them.
    """

    token: int
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...] | None
    """The most probable tokens, best first (ascending ids among equals), `logprobs` of them."""


def check_seeds(seed: int | tuple[int, ...] | None, prompts: int) -> None:
    """Refuse a seed for each of some prompts where there are more of them, or fewer.

    Raises:
        RequestError: there are.
    """
    if isinstance(seed, tuple) and len(seed) != prompts:
        raise RequestError(
            f"seed has {len(seed)} entries for {prompts} prompt{'s' if prompts > 1 else ''}; give "
            "one seed for each prompt, or a single integer"
        )


def row_generator(
    seed: int | tuple[int, ...] | None, prompt_index: int, sequence_index: int
) -> np.random.Generator:
    """The random generator of one sequence.

    One integer serves every prompt, so that a prompt in a batch gets the draws that it gets
    alone; the continuations of one prompt differ by `sequence_index`.

    Args:
        seed: the option `seed`; a sequence has one seed per prompt, None is fresh entropy.
        prompt_index: place of the prompt in the batch.
        sequence_index: which of its `num_return_sequences` this is.
    """
    if isinstance(seed, tuple):
        seed = seed[prompt_index]
    spawn_key = () if seed is None else (sequence_index,)
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=spawn_key))
    )


class RowSampler:
    """One sequence: what was said so far, and how the next token is picked.

    Args:
        options: what was asked for.
        prompt_ids: int64 [n], at least one.
        generator: the row's own; see `row_generator`. Greedy decoding draws nothing from it.
        max_length: tokens of prompt and continuation together, at most
            (`GenerationOptions.total_length`); sizes the history and tells the last step.
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: IntArray,
        generator: np.random.Generator,
        max_length: int | None = None,
    ) -> None:
        self._length = len(prompt_ids)
        self._history = np.empty(max(max_length or 0, self._length), np.int64)
        self._history[: self._length] = prompt_ids
        self._generator = generator
        self._logprobs = options.logprobs
        self._do_sample = options.do_sample
        self._processors = build_processors(options, self._length, max_length)
        rules = [rule for rule in self._processors if isinstance(rule, GrammarRule)]
        self._grammar = rules[0] if rules else None
        self._may_force = options.logprobs is None and all(
            isinstance(rule, _LEAVE_ONE_ALLOWED) for rule in self._processors
        )
        self._warpers = build_warpers(options)
        if options.renormalize_logits and options.do_sample:
            # Changes neither the largest score nor the distribution; kept for exactness.
            self._warpers.append(Renormalize())
        self._picker = CandidatePicker(self._processors, self._warpers, do_sample=options.do_sample)

    @property
    def ids(self) -> IntArray:
        """Prompt and continuation, int64 [n]: a view that the next pick makes stale."""
        return self._history[: self._length]

    @property
    def is_complete(self) -> bool:
        """Whether the grammar that was asked for lets nothing come behind the continuation."""
        return self._grammar is not None and self._grammar.is_complete(self.ids)

    def forced(self) -> list[int]:
        """Tokens that `pick` would choose next whatever the logits are; may be none of them."""
        if self._grammar is None or not self._may_force:
            return []
        return self._grammar.forced(self.ids)

    def take(self, token: int) -> Choice:
        """Append a token of `forced`, as `pick` would: with a draw for it, where it draws."""
        if self._do_sample:
            self._generator.random()
        self._append(token)
        return Choice(token, None, None)

    def pick(self, row: RowLogits) -> Choice:
        """Choose the next token and append it to the history.

        Args:
            row: the model's scores after the last token: not changed, and fetched only if the
                candidates do not decide.

        Raises:
            VerificationError: the logits hold NaN or +inf.
            RequestError: the options forbid every token, or take scores out of float32.
        """
        best = self._pick_candidate(row)
        if best is not None:
            self._append(best)
            return Choice(best, None, None)
        logits = scores = row.full()
        if self._processors or self._warpers:
            scores = logits.astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # told below
                for processor in self._processors:
                    scores = processor(self.ids, scores)
        try:
            token = self._draw(scores) if self._do_sample else _greedy(scores)
        except VerificationError as error:
            usable_maximum(logits)  # whether it is the model's
            raise overflowed() from error
        choice = Choice(token, None, None)
        if self._logprobs is not None:
            choice = with_logprobs(token, logits, self._logprobs)
        self._append(token)
        return choice

    def _pick_candidate(self, row: RowLogits) -> int | None:
        """The token that `pick` gets from all logits; None where it needs them."""
        found = row.candidates if self._logprobs is None else None
        left = found and self._picker.scores(self.ids, found, row.vocab_size)
        if not left:
            return None
        ids, scores = left
        return int(ids[self._place(scores) if self._do_sample else 0])

    def _draw(self, scores: FloatArray) -> int:
        usable_maximum(scores)
        candidates: IntArray | None = None  # ids of `scores`; None: all of them
        for warper in self._warpers:
            scores = warper(self.ids, scores)
            kept = np.flatnonzero(scores > -np.inf)
            if kept.size < scores.size:
                scores = scores[kept]
                candidates = kept if candidates is None else candidates[kept]
        place = self._place(scores)
        return place if candidates is None else int(candidates[place])

    def _place(self, scores: FloatArray) -> int:
        """Where in `scores` the draw falls."""
        weights: NDArray[np.float64] = scores.astype(np.float64)
        cumulative = np.cumsum(np.exp(weights - weights.max()))
        target = self._generator.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, target, side="right"))

    def _append(self, token: int) -> None:
        if self._length == self._history.size:
            self._history = np.concatenate([self._history, np.empty_like(self._history)])
        self._history[self._length] = token
        self._length += 1


def usable_maximum(scores: FloatArray) -> float:
    """The largest of `scores`, after making sure that a token can be chosen.

    Raises:
        VerificationError: NaN or +inf among the scores.
        RequestError: all are -inf.
    """
    top = float(scores.max())
    if np.isnan(top) or top == np.inf:
        raise VerificationError(
            f"the model's logits hold {top}, expected finite numbers; the weights or the "
            "precision overflow: export again with --fp32 and --verify"
        )
    if top == -np.inf:
        raise RequestError(
            "the options forbid every token here; relax grammar, bad_words_ids, suppress_tokens, "
            "logit_bias, logits_processor, no_repeat_ngram_size or min_new_tokens"
        )
    return top


def overflowed() -> RequestError:
    """For finite logits that the options' rules have made infinite, or NaN."""
    return RequestError(
        "the options take scores beyond float32; use smaller numbers for logit_bias, "
        "sequence_bias, presence_penalty, frequency_penalty, repetition_penalty, "
        "exponential_decay_length_penalty or temperature"
    )


def _greedy(scores: FloatArray) -> int:
    token = int(scores.argmax())  # of a NaN, if there is one
    if not np.isfinite(scores[token]):
        usable_maximum(scores)
    return token


def with_logprobs(token: int, logits: FloatArray, count: int) -> Choice:
    """A token with its log probability by log-softmax of `logits` [V], and the `count` best."""
    top = logits.max()
    normalizer = float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    best: tuple[TokenLogprob, ...] = ()
    if count > 0:
        count = min(count, logits.size)
        rank = logits.size - count
        edge = np.partition(logits, rank)[rank]
        candidates = np.flatnonzero(logits >= edge)
        order = candidates[np.argsort(-logits[candidates], kind="stable")][:count]
        best = tuple(TokenLogprob(int(i), float(logits[i]) - normalizer) for i in order)
    return Choice(token, float(logits[token]) - normalizer, best)
