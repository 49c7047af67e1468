"""A loaded bundle: generate, stream, score, and the two calls underneath."""

from __future__ import annotations

import json
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from neo_runtime.errors import ContextLengthError, NeoError, RequestError
from neo_runtime.generator import beam_completions, make_rows, steps
from neo_runtime.kv_cache import CacheLedger, KVCache
from neo_runtime.option_values import count
from neo_runtime.options import GenerationOptions
from neo_runtime.prompts import as_list, named_prompt, token_array, with_bad_words
from neo_runtime.text_stream import TextStream
from neo_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.backends.choice import Chosen
    from neo_runtime.bundle import Bundle
    from neo_runtime.completion import Completion
    from neo_runtime.generator import Row
    from neo_runtime.manifest import Manifest
    from neo_runtime.prompts import Prompt
    from neo_runtime.step_logits import StepLogits

__all__ = ["Model"]

_GENERATION_CONFIG = "generation_config.json"


class Model:
    """A loaded bundle. Several threads may call it at once; made by `load`."""

    def __init__(
        self,
        bundle: Bundle,
        chosen: Chosen,
        *,
        max_cache_bytes: int | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.tokenizer: Tokenizer | None = None
        """None where the bundle has none: prompts are token ids then."""
        if self.manifest.has_tokenizer:
            self.tokenizer = Tokenizer(bundle.file("tokenizer.json"))
        self.backend = chosen.name
        """"cpu", "cuda" or "tensorrt"."""
        self.runs_on = chosen.backend.described
        """The same for a reader: "CPU", a GPU's name, a plan on one."""
        self.backend_choice = chosen.reason
        """Why this backend, in one line, where `backend="auto"` had a choice; else None."""
        self._bundle = bundle
        self._backend = chosen.backend
        self._ledger = CacheLedger(max_cache_bytes)
        self._prefill_chunk = prefill_chunk or self._backend.default_chunk
        self._is_closed = False

    @cached_property
    def defaults(self) -> GenerationOptions:
        """The options that the bundle's `generation_config.json` gives.

        Raises:
            RequestError: the file has an entry that would change the result and is not supported.
        """
        config: dict[str, Any] = {}
        if _GENERATION_CONFIG in self.manifest.files:
            config = json.loads(self._bundle.file(_GENERATION_CONFIG).read_text(encoding="utf-8"))
        return GenerationOptions.from_generation_config(
            config,
            eos_token_id=self.manifest.model.eos_token_id,
            model_max_length=self.manifest.max_length,
        )

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of a key/value cache of `batch` sequences of up to `length` positions."""
        return self._backend.cache_bytes(batch, length)

    @property
    def cache_bytes_in_use(self) -> int:
        """Bytes of the caches that are open now."""
        return self._ledger.in_use

    @property
    def prepacked_bytes(self) -> int:
        """Bytes of prepacked weights that are kept on disk for this bundle."""
        return self._backend.prepacked_bytes

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Allocate an empty cache of `batch` sequences of up to `length` positions.

        Raises:
            CacheLimitError: `max_cache_bytes` would be passed.
            ContextLengthError: `length` is more than the model has.
            RequestError: a size below 1.
        """
        self._check_open()
        if batch < 1 or length < 1:
            raise RequestError(f"a cache of {batch} x {length} positions; expected at least 1 x 1")
        if length > self.manifest.max_length:
            raise ContextLengthError(
                f"a cache of {length} positions, but the bundle has {self.manifest.max_length}; "
                f"ask for at most {self.manifest.max_length}"
            )
        return KVCache(self._backend, self._ledger, batch, length)

    def rounded_length(self, length: int) -> int:
        """`length` rounded up a little, so that rows begin at addresses that suit the processor."""
        return min(-(-max(length, 1) // 16) * 16, self.manifest.max_length)

    def prefill(
        self, cache: KVCache, prompts: Sequence[Sequence[int] | NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """Append the tokens of `prompts[b]` to sequence `b` of the cache.

        Args:
            cache: made by `new_cache`; may hold earlier turns.
            prompts: token ids, at least one for every sequence; lengths may differ.

        Returns:
            Logits after the last token of each, float32 [batch, vocab]: a view that the next
            call with this cache overwrites.

        Raises:
            RequestError: a prompt is empty, a token id is out of range, or the batch differs.
            ContextLengthError: a sequence would outgrow the cache.
        """
        return self.prefill_step(cache, prompts).full()

    def prefill_step(
        self, cache: KVCache, prompts: Sequence[Sequence[int] | NDArray[np.int64]]
    ) -> StepLogits:
        """As `prefill`, with logits that are fetched from where they lie when asked for."""
        self._check_open()
        arrays = [token_array(p, self.manifest.model.vocab_size) for p in prompts]
        if len(arrays) != cache.batch:
            raise RequestError(f"{len(arrays)} prompts for a cache of {cache.batch} sequences")
        self._check_room(cache, [len(array) for array in arrays])
        return cache.store.prefill(arrays, self._prefill_chunk)

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
        """As `decode`, with logits that are fetched from where they lie when asked for."""
        self._check_open()
        ids = token_array(tokens, self.manifest.model.vocab_size)
        if len(ids) != cache.batch:
            raise RequestError(f"{len(ids)} tokens for a cache of {cache.batch} sequences")
        self._check_room(cache, 1)
        return cache.store.decode(ids)

    def logits(self, ids: Prompt | NDArray[np.int64]) -> NDArray[np.float32]:
        """Score every position: text, or token ids [n] → logits of the next token [n, vocab].

        Raises:
            RequestError: no ids, one out of range, or text for a bundle without a tokenizer.
            ContextLengthError: more ids than the model has positions.
        """
        self._check_open()
        array = token_array(ids, self.manifest.model.vocab_size, self.tokenizer)
        if len(array) > self.manifest.max_length:
            raise ContextLengthError(
                f"{len(array)} token ids, but the bundle has {self.manifest.max_length} "
                f"positions; score at most {self.manifest.max_length} at once"
            )
        return self._backend.score(array)

    @overload
    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = ...,
        *,
        bad_words: Sequence[str] = ...,
        batch_size: int | None = ...,
        **overrides: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        options: GenerationOptions | None = ...,
        *,
        bad_words: Sequence[str] = ...,
        batch_size: int | None = ...,
        **overrides: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        options: GenerationOptions | None = None,
        *,
        bad_words: Sequence[str] = (),
        batch_size: int | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or a list of prompts together.

        Args:
            prompt: text, token ids, or a list of these. A prompt in a list gets the result that
                it would get alone (a tuple of seeds has one for each).
            options: instead of the bundle's `defaults`.
            bad_words: words that must not appear; more `bad_words_ids`.
            batch_size: prompts that are computed together; by default all.
            **overrides: options by name, see `GenerationOptions`: `max_new_tokens=50`, …

        Returns:
            A completion for a single prompt; for a list a list in its order. With
            `num_return_sequences` above 1 always a list, the continuations of a prompt together.

        Raises:
            RequestError: a prompt or an option that cannot be honoured.
            ContextLengthError: prompt and continuation need more positions than the model has.
            CacheLimitError: the cache for the batch would pass the limit.
        """
        chosen = self._options(options, overrides, bad_words)
        given, is_single = as_list(prompt)
        prompts = self._encode(given)
        completions = (
            self._search(prompts, chosen)
            if chosen.num_beams > 1
            else self._sample(prompts, chosen, batch_size)
        )
        return completions[0] if is_single and chosen.num_return_sequences == 1 else completions

    def _search(
        self, prompts: list[NDArray[np.int64]], options: GenerationOptions
    ) -> list[Completion]:
        for index, ids in enumerate(prompts):  # before any of them is computed
            with named_prompt(index, len(prompts)):
                options.total_length(len(ids), self.manifest.max_length)
        return [c for ids in prompts for c in beam_completions(self, ids, options)]

    def _sample(
        self, prompts: list[NDArray[np.int64]], options: GenerationOptions, batch_size: int | None
    ) -> list[Completion]:
        count(1, optional=True)("batch_size", batch_size)
        groups = make_rows(self, prompts, options)
        size = batch_size or len(groups)
        for start in range(0, len(groups), size):
            for _ in steps(self, groups[start : start + size]):
                pass
        return [row.completion() for group in groups for row in group]

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        bad_words: Sequence[str] = (),
        **overrides: Any,
    ) -> TextStream:
        """Continue one prompt and yield the text in pieces of valid UTF-8, as they come.

        Nothing is computed before the first piece is asked for, and nothing after `close`.
        The arguments and errors are those of `generate`. The bundle must have a tokenizer.

        Returns:
            An iterator and context manager, with the `completion` once it has ended.
        """
        chosen = self._options(options, overrides, bad_words)
        if self.tokenizer is None:
            raise RequestError("the bundle has no tokenizer, so no text to stream; use generate")
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise RequestError(
                "only one continuation can be streamed; set num_beams=1 and "
                "num_return_sequences=1, or use generate"
            )
        given, is_single = as_list(prompt)
        if not is_single:
            raise RequestError("stream takes one prompt, not a list of them; use generate")
        [[row]] = make_rows(self, self._encode(given), chosen)
        return TextStream(_pieces(self, row))

    def _options(
        self,
        options: GenerationOptions | None,
        overrides: Mapping[str, Any],
        bad_words: Sequence[str],
    ) -> GenerationOptions:
        self._check_open()
        chosen = (options or self.defaults).merged(**overrides)
        chosen = with_bad_words(chosen, bad_words, self.tokenizer)
        chosen.check_vocabulary(self.manifest.model.vocab_size)
        if chosen.stop and self.tokenizer is None:
            raise RequestError("the bundle has no tokenizer, so no text to find stop strings in")
        return chosen

    def _encode(self, prompts: Sequence[Prompt]) -> list[NDArray[np.int64]]:
        if not len(prompts):
            raise RequestError("the list of prompts is empty; give at least one")
        vocab_size = self.manifest.model.vocab_size
        arrays = []
        for index, prompt in enumerate(prompts):
            with named_prompt(index, len(prompts)):
                arrays.append(token_array(prompt, vocab_size, self.tokenizer))
        return arrays

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

    def close(self) -> None:
        """Let go of the graphs. Calls that run in other threads end with an error."""
        self._is_closed = True
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _pieces(model: Model, row: Row) -> Generator[str, None, Completion]:
    with closing(steps(model, [[row]])) as pieces:
        for [piece] in pieces:
            if piece:
                yield piece
    return row.completion()
