"""A loaded bundle as callers see it: generate and stream text."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import ContextLengthError, RequestError
from neo_runtime.generation.batches import sampled_completions
from neo_runtime.generation.generator import beam_completions, never, steps
from neo_runtime.generation.prefix import Prefix
from neo_runtime.generation.rows import cancelled_rows, make_rows
from neo_runtime.generation.speculative import check_drafter, drafted_completions, drafted_steps
from neo_runtime.generation.text_stream import TextStream
from neo_runtime.options.generation_config import GENERATION_CONFIG, file_error
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.options.values import count
from neo_runtime.text.prompts import as_list, of_each, prompt_ids, with_bad_words

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from numpy.typing import NDArray

    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Drafter
    from neo_runtime.generation.rows import Row
    from neo_runtime.text.prompts import Prompt

__all__ = ["Model"]

_NO_TEXT = "the bundle has no tokenizer, so no text to find stop strings in"


class Model(CachedModel):
    """A loaded bundle, returned by `load`. Several threads may call it at once."""

    @cached_property
    def defaults(self) -> GenerationOptions:
        """The options that the bundle's `generation_config.json` gives.

        Raises:
            GenerationConfigError: (a RequestError) the file has a value that cannot be honoured.
        """
        return self.options()

    def options(self, **overrides: Any) -> GenerationOptions:
        """The options of a request: those of the bundle's file, some of them replaced.

        Args:
            **overrides: as for `generate`. An entry of the file that no option stands for, such
                as `max_time`, is left out by `max_time=None`.

        Raises:
            GenerationConfigError: (a RequestError) the file has a value that cannot be honoured,
                and the request does not replace it.
            RequestError: the request has one.
        """
        spec = self.manifest.model
        options = GenerationOptions.from_generation_config(
            self._generation_config,
            eos_token_id=spec.eos_token_id,
            model_max_length=self.manifest.max_length,
            vocab_size=spec.vocab_size,
            overrides=overrides,
        )
        given = {"stop", "stop_strings"} & overrides.keys()
        if options.stop and self.tokenizer is None and not given:
            raise file_error(_NO_TEXT, "stop=()")
        return options

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        if GENERATION_CONFIG not in self.manifest.files:
            return {}
        text = self._bundle.file(GENERATION_CONFIG).read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config

    @overload
    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = ...,
        *,
        bad_words: Sequence[str] = ...,
        batch_size: int | None = ...,
        should_stop: Callable[[], bool] = ...,
        prefix: Prefix | None = ...,
        drafter: Drafter | None = ...,
        num_return_sequences: int,
        **overrides: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = ...,
        *,
        bad_words: Sequence[str] = ...,
        batch_size: int | None = ...,
        should_stop: Callable[[], bool] = ...,
        prefix: Prefix | None = ...,
        drafter: Drafter | None = ...,
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
        should_stop: Callable[[], bool] = ...,
        prefix: Prefix | None = ...,
        drafter: Drafter | None = ...,
        **overrides: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        options: GenerationOptions | None = None,
        *,
        bad_words: Sequence[str] = (),
        batch_size: int | None = None,
        should_stop: Callable[[], bool] = never,
        prefix: Prefix | None = None,
        drafter: Drafter | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or a list of prompts together.

        Args:
            prompt: text, token ids, or a list of these. In a list each prompt is generated as if it
                were alone, up to float rounding: int8 gives the same bits, float32 differs in the
                last digits, and in int4 a sum that rounds the other way can change a text at a near
                tie (docs/performance.md). A tuple of seeds has one per prompt.
            options: used instead of the bundle's `defaults` (including its `eos_token_id`).
            bad_words: words that must not appear; added to `bad_words_ids`.
            batch_size: prompts to compute together; by default as many as make up to 16 sequences
                on a CPU, 32 with CUDA, what a TensorRT plan takes, and fewer where
                `max_cache_bytes` leaves less room.
            should_stop: asked before each batch and after each of its tokens, such as
                `lambda: time.monotonic() > deadline` or a `threading.Event`'s `is_set`; once true,
                whatever has not ended ends with the finish reason "cancelled".
            prefix: what every prompt goes on from, computed before by `prefix`.
            drafter: guesses tokens that are then checked several at once: a `PromptLookup`, or a
                `DraftModel`. Texts stay what they are, up to rounding; prompts are computed one by
                one.
            **overrides: options by name, which take precedence: `max_new_tokens=50`, …; see
                `GenerationOptions`.

        Returns:
            One completion for a single prompt, a list in the same order for a list. With
            `num_return_sequences` (by name, or above 1 in `options`) always a list, the
            continuations of each prompt together.

        Raises:
            RequestError: a prompt or an option that cannot be honoured.
            ContextLengthError: prompt and continuation need more positions than the model has.
            CacheLimitError: the cache for the batch would exceed the limit.
            VerificationError: the logits hold NaN or infinity.
        """
        chosen = self._options(options, overrides, bad_words)
        count(1, optional=True)("batch_size", batch_size)
        given, is_single = as_list(prompt)
        prompts = self._encode(given, prefix)
        if drafter is not None:
            check_drafter(drafter, chosen)
            completions = drafted_completions(self, prompts, chosen, drafter, should_stop, prefix)
        elif chosen.num_beams > 1:
            completions = self._search(prompts, chosen, should_stop, prefix)
        else:
            completions = sampled_completions(
                self, prompts, chosen, batch_size, should_stop, prefix
            )
        is_one = is_single and "num_return_sequences" not in overrides
        return completions[0] if is_one and chosen.num_return_sequences == 1 else completions

    def _search(
        self,
        prompts: list[NDArray[np.int64]],
        options: GenerationOptions,
        should_stop: Callable[[], bool],
        prefix: Prefix | None,
    ) -> list[Completion]:
        # Before any of them is computed:
        of_each(prompts, lambda ids: options.total_length(len(ids), self.manifest.max_length))
        found: list[Completion] = []
        for ids in prompts:
            if should_stop():
                found += [row.completion() for row in cancelled_rows(self, ids, options)]
            else:
                found += beam_completions(self, ids, options, should_stop, prefix)
        return found

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        bad_words: Sequence[str] = (),
        should_stop: Callable[[], bool] = never,
        prefix: Prefix | None = None,
        drafter: Drafter | None = None,
        **overrides: Any,
    ) -> TextStream:
        """Continue one prompt and yield the text in pieces of valid UTF-8, as they come.

        Nothing is computed before the first piece is requested, nor after `close`. Arguments and
        errors are those of `generate`. The bundle must have a tokenizer.

        Returns:
            An iterator and context manager; its `completion` is set when it has ended.
        """
        ids, chosen = self.single_prompt("stream", prompt, options, bad_words, prefix, overrides)
        if self.tokenizer is None:
            raise RequestError("the bundle has no tokenizer, so no text to stream; use generate")
        total = chosen.total_length(len(ids), self.manifest.max_length)
        [row] = make_rows(self, ids, chosen, total, 0, prefix)
        if drafter is not None:
            check_drafter(drafter, chosen)
        closed = threading.Event()
        return TextStream(_pieces(self, row, drafter, should_stop, closed), closed)

    def prefix(self, text: Prompt) -> Prefix:
        """Compute the beginning that many prompts share: instructions, examples.

        Requests with `prefix=` then give only what comes behind it: their tokens are the prefix's
        and the prompt's own, and their results those of the whole prompt, up to float rounding. A
        word must not go over the border: end a prefix before a space or with a line break.

        Args:
            text: text or token ids.

        Returns:
            A context manager that holds the keys and values until its end.

        Raises:
            RequestError: no tokens.
            ContextLengthError: more than the model has positions.
            CacheLimitError: there is no room for its keys and values.
        """
        self._check_open()
        try:
            [ids] = self._encode([text])
        except RequestError as error:
            raise RequestError(f"the prefix cannot be used: {error}") from error
        if len(ids) >= self.manifest.max_length:
            raise ContextLengthError(
                f"the prefix has {len(ids)} tokens and the model {self.manifest.max_length} "
                "positions, which leaves none for a prompt; shorten the prefix"
            )
        return Prefix(self, ids)

    def single_prompt(
        self,
        call: str,
        prompt: Prompt,
        options: GenerationOptions | None,
        bad_words: Sequence[str],
        prefix: Prefix | None,
        overrides: Mapping[str, Any],
    ) -> tuple[NDArray[np.int64], GenerationOptions]:
        """The ids int64 [n], prefix included, and the options of a request for one continuation.

        Both are checked. `call` asks for it, for messages; the others are those of `stream`.
        """
        chosen = self._options(options, overrides, bad_words)
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise RequestError(
                f"{call} makes one continuation; set num_beams=1 and num_return_sequences=1, or "
                "use generate"
            )
        given, is_single = as_list(prompt)
        if not is_single:
            raise RequestError(f"{call} takes one prompt, not a list of them; use generate")
        [ids] = self._encode(given, prefix)
        return ids, chosen

    def _options(
        self,
        options: GenerationOptions | None,
        overrides: Mapping[str, Any],
        bad_words: Sequence[str],
    ) -> GenerationOptions:
        self._check_open()
        if options is not None and not isinstance(options, GenerationOptions):
            raise RequestError(
                f"options is {options!r}, expected GenerationOptions; give single options by name: "
                "max_new_tokens=50"
            )
        if options is not None:
            chosen = options.merged(**overrides)
        else:
            chosen = self.options(**overrides) if overrides else self.defaults
        chosen = with_bad_words(chosen, bad_words, self.tokenizer)
        chosen.check_vocabulary(self.manifest.model.vocab_size)
        if chosen.stop and self.tokenizer is None:
            raise RequestError(_NO_TEXT)
        return chosen

    def _encode(
        self, prompts: Sequence[Prompt], prefix: Prefix | None = None
    ) -> list[NDArray[np.int64]]:
        """The ids of each, behind those of the prefix."""
        if not len(prompts):
            raise RequestError("the list of prompts is empty; give at least one")
        vocab_size = self.manifest.model.vocab_size
        found = of_each(prompts, lambda prompt: prompt_ids(prompt, vocab_size, self.tokenizer))
        if prefix is None:
            return [ids.copy() for ids in found]  # the caller may change its arrays meanwhile
        if not isinstance(prefix, Prefix):
            raise RequestError(
                f"prefix is of type {type(prefix).__name__}, expected one of Model.prefix"
            )
        prefix.check(self)
        return [np.concatenate([prefix.ids, ids]) for ids in found]


def _pieces(
    model: Model,
    row: Row,
    drafter: Drafter | None,
    should_stop: Callable[[], bool],
    closed: threading.Event,
) -> Generator[str, None, Completion | None]:
    with model.new_cache(1, model.rounded_length(row.total - 1)) as cache:
        if drafter is None:
            found = steps(model, cache, [[row]], should_stop)
        else:
            found = drafted_steps(model, cache, row, drafter, should_stop)
        with closing(found):
            for [piece] in found:
                if closed.is_set():  # by another thread; many tokens may pass without any text
                    return None
                if piece:
                    yield piece
    return row.completion()
