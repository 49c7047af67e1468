"""Beam search as a state machine: takes logits, returns which beams continue with which tokens.

The arithmetic is `GenerationMixin._beam_search` of transformers 5, step by step and in float32,
for one prompt. Among candidates of equal score, the lower beam comes first, then the lower token
id (torch's `topk` promises no order).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neo_runtime.errors import RequestError, VerificationError
from neo_runtime.sampling.processors import Renormalize
from neo_runtime.sampling.rules import build_processors
from neo_runtime.sampling.scores import (
    FloatArray,
    IntArray,
    log_softmax,
    overflowed,
    usable_maximum,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_runtime.options.generation_options import GenerationOptions

__all__ = ["BeamResult", "BeamSearch"]

# Stands for "not a candidate", finite as in the reference.
_OUT = np.float32(-1.0e9)

BoolArray = NDArray[np.bool_]


class BeamResult(NamedTuple):
    """One finished hypothesis."""

    token_ids: tuple[int, ...]
    """The continuation, its end-of-sequence token included."""
    score: float
    """Sum of the processed log probabilities / (tokens ** length_penalty)."""


class _Hypotheses(NamedTuple):
    """Hypotheses, one per row, finished or not."""

    ids: IntArray
    """[rows, max_length], of which the first `length` are written."""
    length: IntArray
    score: FloatArray
    finished: BoolArray

    def best_with(self, new: _Hypotheses) -> _Hypotheses:
        """The rows of both with the best scores, as many as `self` has."""
        scores = np.concatenate([self.score, new.score])
        order = np.argsort(-scores, kind="stable")[: self.score.size]
        return _Hypotheses(
            np.concatenate([self.ids, new.ids])[order],
            np.concatenate([self.length, new.length])[order],
            scores[order],
            np.concatenate([self.finished, new.finished])[order],
        )


class BeamSearch:
    """The search for one prompt.

    Usage: run the model on the prompt and pass the logits [1, V] to `step`. Then, while `step`
    returns (parents, tokens), continue beam i from the KV cache of beam `parents[i]` with
    `tokens[i]`, and pass the logits [num_beams, V] to `step`.

    Args:
        options: the options of the request.
        prompt_ids: int64 [n], at least one.
        max_length: most tokens of prompt and continuation together
            (`GenerationOptions.total_length`).
        is_stopped: (prompt and continuation, int64 [n]) → whether the hypothesis ends with a stop
            string. End-of-sequence tokens and the length limit are checked here.
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: IntArray,
        max_length: int,
        is_stopped: Callable[[IntArray], bool] | None = None,
    ) -> None:
        self._options = options
        self._num_beams = options.num_beams
        self._eos = np.array(options.active_eos, np.int64)
        self._is_stopped = is_stopped
        self._max_length = max_length
        self._prompt_length = self._length = len(prompt_ids)
        self._processors = build_processors(options, self._prompt_length, max_length)
        if options.renormalize_logits:
            self._processors.append(Renormalize())

        ids = np.zeros((self._num_beams, max_length), np.int64)
        ids[:, : self._length] = prompt_ids
        self._running = ids
        # All beams are the prompt: only the first may continue, or all would stay the same.
        self._scores = np.full(self._num_beams, _OUT, np.float32)
        self._scores[0] = 0.0
        self._done = _Hypotheses(
            ids=ids.copy(),
            length=np.full(self._num_beams, self._length),
            score=np.full(self._num_beams, -np.inf, np.float32),
            finished=np.zeros(self._num_beams, np.bool_),
        )
        self._is_finished = False
        self.ends_early = False
        """Whether `end_soon` shortened the search."""

    def step(self, logits: FloatArray) -> tuple[IntArray, IntArray] | None:
        """Choose the next tokens.

        Args:
            logits: float32 [num_beams, V], a row for each beam in the order last returned; for
                the prompt [1, V].

        Returns:
            (parents, tokens), int64 [num_beams] each, or None when the search is over.

        Raises:
            RequestError: the options forbid every continuation, or the vocabulary is too small
                for this many beams.
            VerificationError: the logits hold NaN or +inf.
        """
        if self._is_finished:
            return None
        scores, parents, tokens = self._candidates(self._log_probs(logits))
        ids = self._running[parents]
        ids[:, self._length] = tokens
        hits = self._hits(ids, tokens)

        self._update_done(ids, scores, hits)
        running = scores + hits.astype(np.float32) * _OUT
        order = np.argsort(-running, kind="stable")[: self._num_beams]
        self._running, self._scores = ids[order], running[order]
        self._length += 1

        is_full = self._options.early_stopping is True and bool(self._done.finished.all())
        self._is_finished = is_full or bool(hits.all()) or not self._improvement_is_possible()
        return None if self._is_finished else (parents[order], tokens[order])

    def end_soon(self) -> None:
        """End with the next step, as if the length limit were reached there."""
        if self._length + 1 < self._max_length:
            self._max_length = self._length + 1
            self.ends_early = True

    def results(self) -> list[BeamResult]:
        """The best finished hypotheses, best first: `num_return_sequences` of them.

        There are fewer if the options allowed no more continuations (the reference fills such
        places with copies of the prompt, or of a hypothesis, at a score of -1e9).
        """
        done = self._done
        new_tokens = done.length - self._prompt_length
        with np.errstate(over="ignore", invalid="ignore"):  # of places that are not filled
            log_probs = done.score * new_tokens.astype(np.float32) ** self._options.length_penalty
        return [
            BeamResult(
                tuple(map(int, done.ids[row, self._prompt_length : done.length[row]])),
                float(done.score[row]),
            )
            for row in range(self._options.num_return_sequences)
            if done.finished[row] and log_probs[row] > _OUT / 2
        ]

    def _log_probs(self, logits: FloatArray) -> FloatArray:
        """Processed log probabilities, [1 or num_beams, V]."""
        usable_maximum(logits)
        log_probs = log_softmax(logits.astype(np.float32, copy=False))
        for row, ids in enumerate(self._running[: len(log_probs), : self._length]):
            with np.errstate(over="ignore", invalid="ignore"):  # `_candidates` reports it
                for processor in self._processors:
                    log_probs[row] = processor(ids, log_probs[row])
        return log_probs

    def _candidates(self, log_probs: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """The best continuations of all beams: scores, parents, tokens, best first.

        There are (end-of-sequence ids + 1) for each beam, so that at least `num_beams` of them
        continue even if every end-of-sequence candidate ranks higher.
        """
        vocab_size = log_probs.shape[1]
        count = max(2, 1 + self._eos.size) * self._num_beams
        total = (log_probs + self._scores[:, None]).reshape(-1)
        if count > total.size:
            raise RequestError(
                f"beam search compares {count} continuations, but {self._num_beams} beams of "
                f"{vocab_size} tokens have {total.size}; use fewer eos_token_id"
            )
        try:
            usable_maximum(total)
        except VerificationError as error:  # the logits were finite
            raise overflowed() from error
        rank = total.size - count
        edge = np.partition(total, rank)[rank]
        best = np.flatnonzero(total >= edge)
        best = best[np.argsort(-total[best], kind="stable")][:count]
        return total[best], best // vocab_size, best % vocab_size

    def _hits(self, ids: IntArray, tokens: IntArray) -> BoolArray:
        """Which candidates end with this token."""
        hits = np.isin(tokens, self._eos)
        if self._length + 1 >= self._max_length:
            hits[:] = True
        elif self._is_stopped is not None:
            for row in np.flatnonzero(~hits):
                hits[row] = self._is_stopped(ids[row, : self._length + 1])
        return hits

    def _update_done(self, ids: IntArray, scores: FloatArray, hits: BoolArray) -> None:
        """Merge the candidates that just ended into the best finished hypotheses.

        Unfinished candidates get the score -inf. The reference gives them -1e9, but a strongly
        negative length penalty makes real scores smaller than that. As in the reference, an ended
        continuation of a beam that is no candidate counts if its score is above -1e9.
        """
        ended = hits.copy()
        ended[self._num_beams :] = False  # lower ranks only serve to continue beams
        new_tokens = self._length + 1 - self._prompt_length
        with np.errstate(over="ignore"):  # of non-candidates, at -1e9
            found = scores / np.float32(new_tokens**self._options.length_penalty)
        ended &= (scores > _OUT / 2) | (found > _OUT)
        scores = np.where(ended, found, np.float32(-np.inf))
        length = np.full(len(ids), self._length + 1)
        self._done = self._done.best_with(_Hypotheses(ids, length, scores, ended))

    def _improvement_is_possible(self) -> bool:
        """Could the best running beam still beat the worst finished hypothesis?"""
        length = self._length
        if self._options.early_stopping == "never" and self._options.length_penalty > 0.0:
            length = self._max_length
        new_tokens = length - self._prompt_length
        best = self._scores[0] / np.float32(new_tokens**self._options.length_penalty)
        worst = self._done.score.min()  # -inf of a place that is not filled
        if self._scores[0] <= _OUT / 2:  # no beam is a candidate any more
            worst = max(worst, _OUT)
        return bool(best > worst)
