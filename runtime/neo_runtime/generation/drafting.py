"""What guesses the next tokens, for the model to check several of them at once."""

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
"""(ids so far int64 [n], most tokens) → a guess how they go on, int64 [m]; m may be 0."""


class Drafter(ABC):
    """Base class of what `drafter=` takes. Guesses decide when a token is computed, not which.

    Where several tokens are checked at once, their logits are computed by another graph: equal up
    to rounding.
    """

    @abstractmethod
    def begin(self, model: CachedModel, length: int) -> AbstractContextManager[Propose]:
        """Get ready for one sequence; the block around it ends with the sequence.

        Threads may each begin theirs.

        Args:
            model: that will check the guesses.
            length: tokens that prompt and continuation will have at most.

        Raises:
            RequestError: it cannot guess for this model.
        """


class PromptLookup(Drafter):
    """Guesses that what followed the last words earlier in the text follows them again.

    For continuations that repeat parts of their prompt: extracts, lists, edited text, code. It
    costs next to nothing where nothing repeats. (Prompt lookup decoding, as in transformers; the
    latest match is taken here, the first one there.)
    """

    def __init__(
        self, num_tokens: int = 10, max_ngram_size: int = 3, min_ngram_size: int = 2
    ) -> None:
        """Choose.

        Args:
            num_tokens: most tokens that are guessed at once.
            max_ngram_size: so many of the last tokens are looked for, then fewer.
            min_ngram_size: down to so many; one alone is found often, and guesses badly.

        Raises:
            RequestError: not an integer of at least 1, or the smallest is larger than the largest.
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
        for size in range(1, self._most + 1):  # tokens before these ends that are the last ones
            if not len(ends):
                break
            if size >= self._least:
                start = int(ends[-1]) + 1
            ends = ends[ends >= size]
            ends = ends[ids[ends - size] == ids[len(ids) - 1 - size]]
        if start is None:
            return ids[:0]
        # A guess longer than what followed goes on with itself: the text has a period.
        return ids[start + np.arange(wanted) % (len(ids) - start)]
