"""The option `grammar`: only tokens with which the text can still take the form."""

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
    """Forbids all other tokens. The beams of a search may take turns with one rule."""

    def __init__(self, grammar: Grammar, eos: Sequence[int], prompt_length: int) -> None:
        """Begin with nothing written.

        Args:
            grammar: what is followed.
            eos: end-of-sequence ids, allowed where the text is a whole one.
            prompt_length: tokens that are not part of the text.
        """
        self._grammar, self._prompt_length = grammar, prompt_length
        self._matcher, self._is_own = grammar.matcher(), False
        self._eos = np.array(eos, np.int64)
        self._no_text = np.array([*grammar.special_tokens, *eos], np.int64)
        self._read: list[int] = []
        """Tokens that the matcher has."""

    def __call__(self, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the rule to scores, which it may change in place.

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
        """Whether the text is a whole one, and nothing may come behind it."""
        return bool(self._ask(ids, _is_complete))

    def forced(self, ids: NDArray[np.int64]) -> list[int]:
        """Tokens that come next in every text of the form; none where there is a choice."""
        tokens: list[int] = self._ask(ids, _forced)
        no_text = np.flatnonzero(np.isin(tokens, self._no_text))
        return tokens[: no_text[0]] if no_text.size else tokens

    def _ask(self, ids: NDArray[np.int64], question: Callable[[Any], Any]) -> Any:
        """What a matcher says at the end of a text.

        Raises:
            RequestError: it cannot, though no other text has filled its states.
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
        """Bring the matcher to the end of a text: most often what it has, and one token more."""
        written = ids[self._prompt_length :]
        ends = np.flatnonzero(np.isin(written, self._eos))  # of a beam that is out
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
