"""The option `grammar`: only tokens with which the text can still take the form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.errors import RequestError
from neo_runtime.options.grammar import why

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        self._matcher, self._prompt_length = grammar.matcher(), prompt_length
        self._eos = np.array(eos, np.int64)
        self._no_text = np.array([*grammar.special_tokens, *eos], np.int64)
        self._read: list[int] = []
        """Tokens that the matcher has."""

    def __call__(self, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the rule to scores, which it may change in place.

        Raises:
            RequestError: the grammar cannot be followed.
        """
        self._follow(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: scores.size].view(np.bool_)
        allowed[self._no_text[self._no_text < scores.size]] = False
        if self._matcher.is_accepting():
            allowed[self._eos[self._eos < scores.size]] = True
        scores[~allowed] = -np.inf
        return scores

    def is_complete(self, ids: NDArray[np.int64]) -> bool:
        """Whether the text is a whole one, and nothing may come behind it."""
        self._follow(ids)
        return bool(self._matcher.is_accepting() and self._matcher.is_stopped())

    def _follow(self, ids: NDArray[np.int64]) -> None:
        """Bring the matcher to the end of a text: most often what it has, and one token more."""
        written = ids[self._prompt_length :]
        ends = np.flatnonzero(np.isin(written, self._eos))  # of a beam that is out
        tokens: list[int] = written[: ends[0] if ends.size else None].tolist()
        same = len(self._read)
        if tokens[:same] != self._read:
            pairs = zip(tokens, self._read, strict=False)
            same = next((at for at, (new, old) in enumerate(pairs) if new != old), len(tokens))
            self._matcher.rollback(len(self._read) - same)
        if len(tokens) > same:
            self._matcher.consume_tokens(tokens[same:])
        self._read = tokens
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed: {why(self._matcher)}")
