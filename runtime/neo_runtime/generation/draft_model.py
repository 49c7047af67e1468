"""Speculative decoding with a draft model: a small model of the same vocabulary."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import NeoError, RequestError
from neo_runtime.generation.drafting import Drafter
from neo_runtime.options.values import count, number
from neo_runtime.text.shared import shared_length

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.generation.drafting import Propose
    from neo_runtime.sampling.scores import IntArray


__all__ = ["DraftModel"]


class DraftModel(Drafter):
    """Drafts with another bundle, such as GPT-Neo 125M for GPT-Neo 1.3B.

    The draft tokens are the most probable ones of the small model, whatever the options are.
    """

    def __init__(
        self, model: CachedModel, num_tokens: int = 10, confidence_threshold: float = 0.4
    ) -> None:
        """Set the draft model.

        Args:
            model: the small model; must stay open. Each sequence allocates a KV cache in it.
            num_tokens: most draft tokens at once.
            confidence_threshold: a draft ends before a token of a lower probability than this.

        Raises:
            RequestError: `model` is not a model, or a number is out of its range.
        """
        if not isinstance(model, CachedModel):
            raise RequestError(
                f"the draft model is of type {type(model).__name__}, expected neo_runtime.Model"
            )
        self._model = model
        self._num_tokens: int = count(1)("num_tokens", num_tokens)
        limits = number(minimum=0, maximum=1)
        self._threshold: float = limits("confidence_threshold", confidence_threshold)

    @contextmanager
    def begin(self, model: CachedModel, length: int) -> Iterator[Propose]:
        """See `Drafter.begin`."""
        own, other = (each.manifest.model.vocab_size for each in (self._model, model))
        if own != other:
            raise RequestError(
                f"the draft model has {own} tokens and the model {other}, expected one vocabulary"
            )
        with _named():
            self._model.prepare()
            cache = self._model.new_cache(1, self._model.rounded_length(length))
        with cache:
            yield _Sequence(self._model, cache, self._num_tokens, self._threshold).propose


class _Sequence:
    """One sequence in the small model's KV cache."""

    def __init__(
        self, model: CachedModel, cache: KVCache, num_tokens: int, threshold: float
    ) -> None:
        self._model, self._cache = model, cache
        self._num_tokens, self._threshold = num_tokens, threshold
        self._read = np.empty(0, np.int64)
        """The tokens in the cache."""

    def propose(self, ids: IntArray, most: int) -> IntArray:
        """See `Propose`; no tokens if the small model has too few positions."""
        with _named():
            return self._proposed(ids, most)

    def _proposed(self, ids: IntArray, most: int) -> IntArray:
        wanted = min(most, self._num_tokens, self._cache.length - len(ids) + 1)
        if wanted < 1:
            return ids[:0]
        logits = self._read_on(ids)
        # Tokens appended from here on may have to be cropped again.
        wanted = min(wanted, self._cache.room_to_crop + 1)
        guess: list[int] = []
        while True:
            token = int(logits.argmax())
            if _probability(logits, token) < self._threshold:
                break
            guess.append(token)
            if len(guess) == wanted:
                break
            logits = self._next(np.array([token]))
            self._read = np.append(self._read, token)
        return np.array(guess, np.int64)

    def _read_on(self, ids: IntArray) -> NDArray[np.float32]:
        """Crop wrong draft tokens, append the new tokens, and return the logits after the last."""
        shared = shared_length(self._read, ids[:-1])
        self._cache.crop(shared)
        new = ids[shared:]
        self._read = ids.copy()
        if len(new) == 1:
            return self._next(new)
        logits: NDArray[np.float32] = self._model.prefill(self._cache, [new])[0]
        return logits

    def _next(self, token: IntArray) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._model.decode(self._cache, token)[0]
        return logits


@contextmanager
def _named() -> Iterator[None]:
    """Prefix the messages of errors with "the draft model"."""
    try:
        yield
    except NeoError as error:
        raise type(error)(f"the draft model: {error}") from error


def _probability(logits: NDArray[np.float32], token: int) -> float:
    return 1.0 / float(np.exp(logits - logits[token]).sum(dtype=np.float64))
