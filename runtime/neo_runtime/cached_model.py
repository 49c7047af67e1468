"""A loaded bundle as a function of token ids: KV caches, prefill, decode, logits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.backends.base import score_in_chunks
from neo_runtime.cache.kv_cache import KVCache, row_numbers
from neo_runtime.cache.ledger import CacheLedger
from neo_runtime.cache.prefix_cache import PrefixCache
from neo_runtime.closable import Closable
from neo_runtime.errors import ContextLengthError, NeoError, RequestError
from neo_runtime.options.values import count
from neo_runtime.text.prompts import has_parts, of_each, prompt_ids, token_array
from neo_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.choice import Chosen
    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.manifest import Manifest
    from neo_runtime.text.prompts import Prompt

__all__ = ["CachedModel"]


class CachedModel(Closable):
    """Base class of `Model`: KV caches and the calls of the graphs; no options, no sampling."""

    def __init__(
        self,
        bundle: Bundle,
        chosen: Chosen,
        *,
        max_cache_bytes: int | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.name = bundle.path.name
        """Name of the bundle's folder."""
        self.tokenizer: Tokenizer | None = None
        """None if the bundle has no tokenizer; prompts must then be token ids."""
        if self.manifest.has_tokenizer:
            self.tokenizer = Tokenizer(bundle.file("tokenizer.json"))
        self.backend = chosen.name
        """"cpu", "cuda" or "tensorrt"."""
        self.runs_on = chosen.backend.described
        """A description of the hardware: "CPU", a GPU's name, a TensorRT plan on a GPU."""
        self.backend_choice = chosen.reason
        """Why `backend="auto"` chose this backend, in one line; None if there was no choice."""
        self._bundle = bundle
        self._backend = chosen.backend
        self._ledger = CacheLedger(max_cache_bytes)
        self.prefill_chunk = prefill_chunk or self._backend.default_chunk
        """Prompt tokens per call of the prefill graph."""
        self._is_closed = False
        self._process = os.getpid()

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"<neo_runtime.Model {self.name}: {manifest.precision}, target {manifest.target}, on "
            f"{self.runs_on}, digest {manifest.digest[:12]}>"
        )

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of a key/value cache of `batch` sequences of up to `length` positions."""
        return self._backend.cache_bytes(batch, length)

    @property
    def cache_bytes_in_use(self) -> int:
        """Bytes of the caches that are open now."""
        return self._ledger.in_use

    @property
    def cache_bytes_left(self) -> int | None:
        """Bytes that further caches may take; None without `max_cache_bytes`."""
        return self._ledger.left

    @property
    def default_batch(self) -> int:
        """Sequences that `generate` computes together if `batch_size` is not given."""
        return self._backend.default_batch

    def prepare(self, *, scores: bool = False) -> None:
        """Load the graphs for prefill and decode now instead of at the first request.

        Args:
            scores: load the graph for `logits` as well, which also verifies draft tokens.
        """
        self._check_open()
        self._backend.prepare(("prefill", "decode", *(["score"] if scores else [])))

    @property
    def prepacked_bytes(self) -> int:
        """Bytes of this bundle's prepacked weights in the cache folder."""
        return self._backend.prepacked_bytes

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Allocate an empty cache of `batch` sequences of up to `length` positions.

        Raises:
            CacheLimitError: `max_cache_bytes` would be exceeded.
            ContextLengthError: `length` is more than the model has positions.
            RequestError: a size is below 1.
        """
        self._check_open()
        count(1)("batch", batch)
        count(1)("length", length)
        if length > self.manifest.max_length:
            raise ContextLengthError(
                f"a cache of {length} positions, but the bundle has {self.manifest.max_length}; "
                f"ask for at most {self.manifest.max_length}"
            )
        return KVCache(self._backend, self._ledger, batch, length)

    def new_prefix_cache(self, size: int) -> PrefixCache:
        """Allocate a prefix cache of at most `size` bytes.

        Raises:
            RequestError: the size is too small.
            CacheLimitError: `max_cache_bytes` would be exceeded.
        """
        self._check_open()
        return PrefixCache(self._backend, self._ledger, size, self.prefill_chunk)

    def owns(self, cache: KVCache) -> bool:
        """Whether a cache belongs to this model."""
        return cache.is_of(self._backend)

    def rounded_length(self, length: int) -> int:
        """`length` rounded up to a multiple of 16 to align rows; at most the model's positions."""
        return min(-(-max(length, 1) // 16) * 16, self.manifest.max_length)

    def prefill(
        self,
        cache: KVCache,
        prompts: Sequence[Sequence[int] | NDArray[np.int64]],
        rows: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Append the tokens of `prompts[i]` to sequence `rows[i]` of the cache.

        Args:
            cache: made by `new_cache`; may already hold tokens.
            prompts: token ids for each of these sequences, at least one each; lengths may differ.
            rows: indices of the sequences, ascending, each once; None for all. Other sequences do
                not change.

        Returns:
            Logits after the last token of each prompt, float32 [rows, vocab]: a view that the next
            call with this cache overwrites.

        Raises:
            RequestError: a prompt is empty, a token id is out of range, or the numbers of prompts
                and sequences differ.
            ContextLengthError: a sequence would outgrow the cache.
        """
        return self.prefill_step(cache, prompts, rows).full()

    def prefill_step(
        self,
        cache: KVCache,
        prompts: Sequence[Sequence[int] | NDArray[np.int64]],
        rows: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> StepLogits:
        """As `prefill`, but logits are fetched from the device only when requested."""
        self._check_cache(cache)
        vocab_size = self.manifest.model.vocab_size
        if not has_parts(prompts):
            raise RequestError(f"prompts is {prompts!r}, expected token ids for each sequence")
        arrays = of_each(prompts, lambda ids: token_array(ids, vocab_size))
        chosen = self._prompt_rows(cache, rows, len(arrays))
        by_row = [np.empty(0, np.int64)] * cache.batch
        for row, array in zip(chosen, arrays, strict=True):
            by_row[row] = array
        self._check_room(cache, [len(array) for array in by_row])
        with cache.changing() as store:
            logits = store.prefill(by_row, self.prefill_chunk)
        return logits if len(chosen) == len(by_row) else logits.take(chosen)

    def _prompt_rows(
        self, cache: KVCache, rows: Sequence[int] | NDArray[np.int64] | None, prompts: int
    ) -> NDArray[np.int64]:
        if rows is None:
            if prompts != cache.batch:
                raise RequestError(f"{prompts} prompts for a cache of {cache.batch} sequences")
            return np.arange(prompts)
        chosen = row_numbers("prefill", rows, cache.batch)
        if len(chosen) != prompts or not prompts:
            raise RequestError(f"{prompts} prompts for {len(chosen)} rows, expected one for each")
        if (np.diff(chosen) <= 0).any():
            raise RequestError(
                f"prefill got rows {chosen.tolist()}, expected each once, in ascending order"
            )
        return chosen

    def decode(
        self, cache: KVCache, tokens: Sequence[int] | NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Append one token to every sequence of the cache.

        Args:
            cache: made by `new_cache`.
            tokens: token ids [batch].

        Returns:
            Logits, float32 [batch, vocab]: a view that the next call with this cache overwrites.

        Raises:
            RequestError: a token id is out of range, or the batch differs.
            ContextLengthError: a sequence would outgrow the cache.
        """
        return self.decode_step(cache, tokens).full()

    def decode_step(self, cache: KVCache, tokens: Sequence[int] | NDArray[np.int64]) -> StepLogits:
        """As `decode`, but logits are fetched from the device only when requested."""
        self._check_cache(cache)
        ids = token_array(tokens, self.manifest.model.vocab_size)
        if len(ids) != cache.batch:
            raise RequestError(f"{len(ids)} tokens for a cache of {cache.batch} sequences")
        self._check_room(cache, 1)
        with cache.changing() as store:
            return store.decode(ids)

    def logits(
        self, ids: Prompt | NDArray[np.int64], cache: KVCache | None = None
    ) -> NDArray[np.float32]:
        """Compute the logits at every position: text, or token ids [n] → float32 [n, vocab].

        Args:
            ids: text or token ids.
            cache: the context: `ids` continue its only sequence and are appended to it.
                `KVCache.crop` removes them again, so that other endings can be scored.

        Raises:
            RequestError: there are no ids, one is out of range, text is given but the bundle has no
                tokenizer, or the cache does not have exactly one sequence.
            ContextLengthError: there are more ids than the model or the cache has positions for.
            CacheLimitError: there is no room for the keys and values.
        """
        self._check_open()
        array = prompt_ids(ids, self.manifest.model.vocab_size, self.tokenizer)
        if cache is not None:
            return self._logits_behind(cache, array)
        if len(array) > self.manifest.max_length:
            raise ContextLengthError(
                f"{len(array)} token ids, but the bundle has {self.manifest.max_length} "
                f"positions; score at most {self.manifest.max_length} at once"
            )
        with self.new_cache(1, len(array)) as own:
            return self._logits_behind(own, array)

    def _logits_behind(self, cache: KVCache, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._check_cache(cache)
        if cache.batch != 1:
            raise RequestError(f"a cache of {cache.batch} sequences, expected one to score behind")
        self._check_room(cache, len(ids))
        chunk = min(self.prefill_chunk, self._backend.scored_at_once)
        with cache.changing() as store:
            return score_in_chunks(store, ids, self.manifest.model.vocab_size, chunk)

    def _check_cache(self, cache: KVCache) -> None:
        self._check_open()
        if not isinstance(cache, KVCache):
            raise RequestError(
                f"the cache is of type {type(cache).__name__}, expected one of Model.new_cache"
            )
        if not self.owns(cache):
            raise RequestError("the cache is another model's; make one with this one's new_cache")

    def _check_room(self, cache: KVCache, more: int | Sequence[int]) -> None:
        needed = cache.store.lengths + more
        if (needed > cache.length).any():
            row = int(needed.argmax())
            raise ContextLengthError(
                f"sequence {row} has {cache.store.lengths[row]} positions and would have "
                f"{needed[row]}, but the cache has {cache.length}; make a longer one "
                f"(the bundle has {self.manifest.max_length})"
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise NeoError("the model is closed; call neo_runtime.load again")
        if self.backend != "cpu" and os.getpid() != self._process:
            raise NeoError(
                "the model was loaded in another process, and its GPU memory does not survive a "
                "fork; call neo_runtime.load in each process"
            )

    def close(self) -> None:
        """Free the graphs. Calls still running in other threads end with an error."""
        self._is_closed = True
        self._backend.close()
