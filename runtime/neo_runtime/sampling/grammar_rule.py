"""Constrained decoding (option `grammar`): only tokens with which the text can still match."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.errors import RequestError
from neo_runtime.options.grammar import why
from neo_runtime.text.shared import shared_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from neo_runtime.options.grammar import Grammar

__all__ = ["GrammarRule"]


class GrammarRule:
    """Forbids all tokens that the grammar does not allow. All beams of a search share one rule."""

    def __init__(self, grammar: Grammar, eos: Sequence[int], prompt_length: int) -> None:
        """Begin with an empty text.

        Args:
            grammar: the compiled grammar.
            eos: end-of-sequence ids, allowed where the text is complete.
            prompt_length: tokens of the prompt, which is not part of the text.
        """
        self._grammar, self._prompt_length = grammar, prompt_length
        self._matcher, self._is_own = grammar.matcher(), False
        self._eos = np.array(eos, np.int64)
        self._no_text = np.array([*grammar.special_tokens, *eos], np.int64)
        self._read: list[int] = []
        """Tokens that the matcher has consumed."""

    def __call__(self, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the rule to scores, which it changes in place.

        Raises:
            RequestError: the grammar cannot be followed.
        """
        bits = np.frombuffer(self._ask(ids, _bitmask), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: scores.size].view(np.bool_)
        allowed[self._no_text[self._no_text < scores.size]] = False
        if self._matcher.is_accepting():
            allowed[self._eos[self._eos < scores.size]] = True
        scores[~allowed] = -np.inf
        return scores

    def is_complete(self, ids: NDArray[np.int64]) -> bool:
        """Whether the text is complete and cannot be continued."""
        return bool(self._ask(ids, _is_complete))

    def forced(self, ids: NDArray[np.int64]) -> list[int]:
        """Tokens that come next in every text that matches; empty where there is a choice."""
        tokens: list[int] = self._ask(ids, _forced)
        no_text = np.flatnonzero(np.isin(tokens, self._no_text))
        return tokens[: no_text[0]] if no_text.size else tokens

    def _ask(self, ids: NDArray[np.int64], question: Callable[[Any], Any]) -> Any:
        """The answer of the matcher at the end of a text.

        If the shared matcher fails, a matcher of this rule's own is tried.

        Raises:
            RequestError: the matcher of its own fails as well.
        """
        found = self._asked(ids, question)
        if self._matcher.is_error() and not self._is_own:
            self._matcher, self._is_own, self._read = self._grammar.own_matcher(), True, []
            found = self._asked(ids, question)
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed: {why(self._matcher)}")
        return found

    def _asked(self, ids: NDArray[np.int64], question: Callable[[Any], Any]) -> Any:
        self._follow(ids)
        return None if self._matcher.is_error() else question(self._matcher)

    def _follow(self, ids: NDArray[np.int64]) -> None:
        """Bring the matcher to the end of a text, usually by one more token."""
        written = ids[self._prompt_length :]
        ends = np.flatnonzero(np.isin(written, self._eos))  # a beam that has ended has one
        tokens: list[int] = written[: ends[0] if ends.size else None].tolist()
        same = len(self._read)
        if tokens[:same] != self._read:
            same = shared_length(tokens, self._read)
            self._matcher.rollback(len(self._read) - same)
        if len(tokens) > same:
            self._matcher.consume_tokens(tokens[same:])
        self._read = tokens


def _bitmask(matcher: Any) -> bytes:
    bits: bytes = matcher.compute_bitmask()
    return bits


def _forced(matcher: Any) -> list[int]:
    tokens: list[int] = matcher.compute_ff_tokens()
    return tokens


def _is_complete(matcher: Any) -> bool:
    return bool(matcher.is_accepting() and matcher.is_stopped())
