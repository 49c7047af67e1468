"""Drafters for speculative decoding: they propose draft tokens that the model verifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from neo_runtime.errors import RequestError
from neo_runtime.options.values import count
from neo_runtime.sampling.scores import IntArray

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from neo_runtime.cached_model import CachedModel

__all__ = ["Drafter", "Propose", "PromptLookup"]

Propose: TypeAlias = Callable[[IntArray, int], IntArray]
"""(ids so far int64 [n], most draft tokens) → draft tokens int64 [m]; m may be 0."""


class Drafter(ABC):
    """Base class of the values of `drafter=`.

    Draft tokens affect how fast tokens are generated, not which ones: each is verified. Several
    tokens are verified at once by another graph, whose logits are equal up to rounding.
    """

    @abstractmethod
    def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
        """Begin one sequence; the context manager that is returned ends with the sequence.

        Several threads may call this at once.

        Args:
            model: the model that verifies the draft tokens.
            length: most tokens of prompt and continuation together.

        Raises:
            RequestError: the drafter does not fit this model.
        """


class PromptLookup(Drafter):
    """Drafts by prompt lookup: finds the last tokens earlier in the text, proposes what followed.

    For continuations that repeat parts of their prompt: extracts, lists, edited text, code. The
    cost is negligible where nothing repeats. (Prompt lookup decoding, as in transformers, which
    uses the first match; this class uses the latest.)
    """

    def __init__(
        self, num_tokens: int = 10, max_ngram_size: int = 3, min_ngram_size: int = 2
    ) -> None:
        """Set the sizes.

        Args:
            num_tokens: most draft tokens at once.
            max_ngram_size: most of the last tokens to search for; the longest match is used.
            min_ngram_size: fewest of them to search for. A single token often has a match, but
                drafts from it are seldom right.

        Raises:
            RequestError: a value is not an integer of at least 1, or `min_ngram_size` is larger
                than `max_ngram_size`.
        """
        self._num_tokens: int = count(1)("num_tokens", num_tokens)
        self._most: int = count(1)("max_ngram_size", max_ngram_size)
        self._least: int = count(1)("min_ngram_size", min_ngram_size)
        if self._least > self._most:
            raise RequestError(
                f"min_ngram_size is {min_ngram_size}, expected at most max_ngram_size, "
                f"{max_ngram_size}"
            )

    def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
        """See `Drafter.begin`."""
        return nullcontext(self._propose)

    def _propose(self, ids: IntArray, most: int) -> IntArray:
        wanted = min(self._num_tokens, most)
        ends = np.flatnonzero(ids[:-1] == ids[-1])
        start = None
        # At each size, `ends` are the ends of all earlier matches of the last `size` tokens.
        for size in range(1, self._most + 1):
            if not len(ends):
                break
            if size >= self._least:
                start = int(ends[-1]) + 1
            ends = ends[ends >= size]
            ends = ends[ids[ends - size] == ids[len(ids) - 1 - size]]
        if start is None:
            return ids[:0]
        # A draft longer than the text after the match repeats that text: it is taken as periodic.
        return ids[start + np.arange(wanted) % (len(ids) - start)]
