"""A loaded bundle as callers see it: generate and stream text."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any, overload

from neo_runtime.errors import ContextLengthError, RequestError
from neo_runtime.generation.batches import sampled_completions
from neo_runtime.generation.beams import searched_completions
from neo_runtime.generation.generator import never, steps
from neo_runtime.generation.prefix import Prefix, held
from neo_runtime.generation.rows import make_rows
from neo_runtime.generation.speculative import check_drafter, drafted_completions, drafted_steps
from neo_runtime.generation.text_stream import TextStream
from neo_runtime.generation.token_scores import scored_tokens
from neo_runtime.options.values import callback, count
from neo_runtime.request_model import RequestModel
from neo_runtime.sampling.seeds import check_seeds
from neo_runtime.text.prompts import as_list

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Drafter
    from neo_runtime.generation.rows import Row
    from neo_runtime.generation.text_stream import Piece
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.sampling.choice import Choice
    from neo_runtime.text.prompts import Prompt

__all__ = ["Model"]


class Model(RequestModel):
    """A loaded bundle, returned by `load`. Several threads may call it at once."""

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
            prompt: text, token ids, or a list of these. Each prompt in a list gives the result that
                it gives alone, up to float rounding: int8 gives the same bits, float32 differs in
                the last digits, and in int4 a sum that rounds the other way can change a text at a
                near tie (docs/accuracy.md).
            options: used instead of the bundle's `defaults` (including its `eos_token_id`).
            bad_words: words that must not appear; added to `bad_words_ids`.
            batch_size: prompts to compute together. By default as many as make up to 16 sequences
                on a CPU, 32 with CUDA, or the batch size of a TensorRT plan; fewer where
                `max_cache_bytes` leaves less room.
            should_stop: called before each batch and after each of its tokens, for example
                `lambda: time.monotonic() > deadline` or the `is_set` of a `threading.Event`. Once
                it returns true, every unfinished continuation ends with the finish reason
                "cancelled".
            prefix: a shared beginning of all prompts, computed earlier by `Model.prefix`. Prompts
                are given without it.
            drafter: proposes draft tokens, which the model verifies several at a time (speculative
                decoding): a `PromptLookup` or a `DraftModel`. The text stays the same, up to
                rounding. Prompts are then computed one after the other.
            **overrides: options by name, which take precedence: `max_new_tokens=50`, …; see
                `GenerationOptions`.

        Returns:
            One completion for a single prompt; for a list of prompts, a list in the same order.
            With `num_return_sequences` (given by name, or above 1 in `options`) always a list, in
            which the continuations of one prompt are adjacent.

        Raises:
            RequestError: a prompt or an option cannot be honoured.
            ContextLengthError: prompt and continuation need more positions than the model has.
            CacheLimitError: the cache for the batch would exceed the limit.
            VerificationError: the logits hold NaN or infinity.
        """
        chosen = self.request_options(options, overrides, bad_words)
        count(1, optional=True)("batch_size", batch_size)
        callback("should_stop", should_stop)
        given, is_single = as_list(prompt)
        prompts = self.encode_prompts(given, prefix)
        check_seeds(chosen.seed, len(prompts))
        if drafter is not None:
            check_drafter(drafter, chosen)
        with held(prefix):
            if drafter is not None:
                found = drafted_completions(self, prompts, chosen, drafter, should_stop, prefix)
            elif chosen.num_beams > 1:
                found = searched_completions(self, prompts, chosen, should_stop, prefix)
            else:
                found = sampled_completions(self, prompts, chosen, batch_size, should_stop, prefix)
        is_one = is_single and "num_return_sequences" not in overrides
        return found[0] if is_one and chosen.num_return_sequences == 1 else found

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
        """Continue one prompt and yield its text as it is generated, in pieces of valid UTF-8.

        Nothing is computed before the first piece is requested, nor after `close`. Arguments and
        errors are those of `generate`. The bundle must have a tokenizer.

        Returns:
            An iterator and context manager; its `completion` is available once it is exhausted.
        """
        callback("should_stop", should_stop)
        ids, chosen = self.single_prompt("stream", prompt, options, bad_words, prefix, overrides)
        if self.tokenizer is None:
            raise RequestError("the bundle has no tokenizer, so no text to stream; use generate")
        total = chosen.total_length(len(ids), self.manifest.max_length)
        [row] = make_rows(self, ids, chosen, total, 0, prefix)
        if drafter is not None:
            check_drafter(drafter, chosen)
        closed = threading.Event()
        return TextStream(_pieces(self, row, drafter, should_stop, closed), closed)

    def token_logprobs(self, text: Prompt, *, top_logprobs: int = 0) -> list[Choice]:
        """The log probability of each token of a text, given the tokens before it.

        The values are the log-softmax of `logits`, but only one chunk of logits is in memory at a
        time. Their sum is the text's log likelihood, given its first token.

        Args:
            text: text or token ids [n].
            top_logprobs: how many of the most probable tokens to report at each position as well.

        Returns:
            One `Choice` per token except the first, n - 1 in all: its id, its log probability, and
            the most probable tokens at its position.

        Raises:
            RequestError: the text has no tokens, or an argument is invalid.
            ContextLengthError: the text has more tokens than the model has positions.
            CacheLimitError: there is no room for the keys and values.
            VerificationError: the logits hold NaN or infinity.
        """
        self._check_open()
        most: int = count(0)("top_logprobs", top_logprobs)
        [ids] = self.encode_prompts([text])
        if len(ids) > self.manifest.max_length:
            raise ContextLengthError(
                f"{len(ids)} tokens, but the model has {self.manifest.max_length} positions; score "
                f"at most {self.manifest.max_length} at once"
            )
        return scored_tokens(self, ids, most)

    def prefix(self, text: Prompt) -> Prefix:
        """Compute a beginning that many prompts share, such as instructions or examples.

        A request with `prefix=` then gives only the rest of its prompt. Its tokens are those of the
        prefix followed by those of the rest; the result is that of the whole prompt, up to float
        rounding. The two parts are tokenized separately, so a word must not span both: end a prefix
        before a space or with a line break.

        Args:
            text: text or token ids.

        Returns:
            A context manager that holds the keys and values until it is closed.

        Raises:
            RequestError: the text has no tokens.
            ContextLengthError: the text leaves no position for a prompt.
            CacheLimitError: there is no room for its keys and values.
        """
        self._check_open()
        try:
            [ids] = self.encode_prompts([text])
        except RequestError as error:
            raise RequestError(f"the prefix cannot be used: {error}") from error
        if len(ids) >= self.manifest.max_length:
            raise ContextLengthError(
                f"the prefix has {len(ids)} tokens and the model {self.manifest.max_length} "
                "positions, which leaves none for a prompt; shorten the prefix"
            )
        return Prefix(self, ids)


def _pieces(
    model: Model,
    row: Row,
    drafter: Drafter | None,
    should_stop: Callable[[], bool],
    closed: threading.Event,
) -> Generator[Piece, None, Completion | None]:
    with held(row.prefix), model.new_cache(1, model.rounded_length(row.total - 1)) as cache:
        if drafter is None:
            found = steps(model, cache, [[row]], should_stop)
        else:
            found = drafted_steps(model, cache, row, drafter, should_stop)
        with closing(found):
            for [piece] in found:
                if closed.is_set():  # by another thread; many tokens may yield no text
                    return None
                if piece:
                    yield piece
    return row.completion()
