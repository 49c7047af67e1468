"""Picks the next token of one sequence.

A draw takes exactly one float64 u from the row's own generator (PCG64, whose stream numpy keeps
across versions) and inverts the cumulative distribution of the candidates, in ascending order of
their ids: the token is the first whose cumulative weight is above u · total. `Generator.choice`
and `multinomial` are not used, since their results may change between numpy versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.errors import VerificationError
from neo_runtime.sampling.candidates import CandidatePicker
from neo_runtime.sampling.choice import Choice, with_logprobs
from neo_runtime.sampling.grammar_rule import GrammarRule
from neo_runtime.sampling.processors import CountPenalty, MinLength, Renormalize, RepetitionPenalty
from neo_runtime.sampling.rules import build_processors
from neo_runtime.sampling.scores import FloatArray, IntArray, overflowed, usable_maximum
from neo_runtime.sampling.warpers import build_warpers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from neo_runtime.backends.step_logits import RowLogits
    from neo_runtime.options.generation_options import GenerationOptions

__all__ = ["RowSampler"]


_LEAVE_ONE_ALLOWED = (GrammarRule, CountPenalty, MinLength, RepetitionPenalty)
"""Processors beside which a token is certainly chosen if it is the only one a grammar allows."""


class RowSampler:
    """One sequence: its tokens so far, and the choice of the next one.

    Args:
        options: the options of the request.
        prompt_ids: int64 [n], at least one.
        generator: the row's own; see `row_generator`. Greedy decoding draws nothing from it.
        max_length: most tokens of prompt and continuation together
            (`GenerationOptions.total_length`).
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: IntArray,
        generator: np.random.Generator,
        max_length: int,
    ) -> None:
        self._length = len(prompt_ids)
        self._history = np.empty(max_length, np.int64)
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
        """Prompt and continuation, int64 [n]: a view without the tokens of later picks."""
        return self._history[: self._length]

    @property
    def is_complete(self) -> bool:
        """Whether there is a grammar and it allows no further text."""
        return self._grammar is not None and self._grammar.is_complete(self.ids)

    def forced(self) -> list[int]:
        """Tokens that `pick` would choose next whatever the logits are; may be empty."""
        if self._grammar is None or not self._may_force:
            return []
        return self._grammar.forced(self.ids)

    def take(self, token: int) -> Choice:
        """Append a token of `forced`. When sampling, consume one random draw, as `pick` would."""
        if self._do_sample:
            self._generator.random()
        self._append(token)
        return Choice(token, None, None)

    def pick(self, row: RowLogits) -> Choice:
        """Choose the next token and append it to the history.

        Args:
            row: the logits after the last token; not changed, and fetched only if the candidates do
                not decide.

        Raises:
            VerificationError: the logits hold NaN or +inf.
            RequestError: the options forbid every token, or make scores overflow float32.
        """
        best = self._pick_candidate(row)
        if best is not None:
            self._append(best)
            return Choice(best, None, None)
        logits = scores = row.full()
        if self._processors or self._warpers:
            scores = logits.astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # reported below
                for processor in self._processors:
                    scores = processor(self.ids, scores)
        try:
            token = self._draw(scores) if self._do_sample else _greedy(scores)
        except VerificationError as error:
            usable_maximum(logits)  # raises if the model's logits are the cause
            raise overflowed() from error
        choice = Choice(token, None, None)
        if self._logprobs is not None:
            choice = with_logprobs(token, logits, self._logprobs)
        self._append(token)
        return choice

    def _pick_candidate(self, row: RowLogits) -> int | None:
        """The token that `pick` would choose from all logits; None if it needs them."""
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
        """Index in `scores` of the token drawn."""
        weights: NDArray[np.float64] = scores.astype(np.float64)
        cumulative = np.cumsum(np.exp(weights - weights.max()))
        target = self._generator.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, target, side="right"))

    def _append(self, token: int) -> None:
        self._history[self._length] = token
        self._length += 1


def _greedy(scores: FloatArray) -> int:
    token = int(scores.argmax())  # index of a NaN, if there is one
    if not np.isfinite(scores[token]):
        usable_maximum(scores)
    return token
