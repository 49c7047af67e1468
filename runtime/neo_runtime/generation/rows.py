"""One continuation being generated: its tokens, text and timings."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from neo_runtime.generation.completion import Completion, Timings
from neo_runtime.generation.prefix import length_of
from neo_runtime.generation.text_stream import Piece, StopMatcher, StreamDecoder
from neo_runtime.sampling.row_sampler import RowSampler
from neo_runtime.sampling.seeds import row_generator
from neo_runtime.text.prompts import of_each

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_runtime.backends.step_logits import RowLogits
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.completion import FinishReason
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.sampling.choice import Choice
    from neo_runtime.sampling.scores import IntArray
    from neo_runtime.text.tokenizer import Tokenizer


__all__ = ["Row", "Stopwatch", "cancelled_completions", "make_rows", "total_lengths"]


class Stopwatch:
    """Times in seconds since the start."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self.prefill = self.first = self.last = 0.0

    def seconds(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start

    def timings(
        self, tokens: int, *, drafted: int = 0, accepted: int = 0, forced: int = 0, cached: int = 0
    ) -> Timings:
        """Timings for a completion of this many tokens; for the other arguments see `Timings`."""
        decode = self.last - self.first
        return Timings(
            prefill_seconds=self.prefill,
            time_to_first_token=self.first,
            decode_seconds=decode,
            tokens_per_second=(tokens - 1) / decode if tokens > 1 and decode > 0 else 0.0,
            draft_tokens=drafted,
            accepted_draft_tokens=accepted,
            forced_tokens=forced,
            cached_prompt_tokens=cached,
        )


class Row:
    """One continuation being generated."""

    def __init__(
        self,
        prompt: IntArray,
        options: GenerationOptions,
        sampler: RowSampler,
        total: int,
        tokenizer: Tokenizer | None,
        prefix: Prefix | None,
        index: int,
    ) -> None:
        """Begin with nothing generated.

        Args:
            prompt: int64 [n], the prefix included.
            options: the options of the request.
            sampler: this row's own sampler.
            total: most tokens of prompt and continuation together.
            tokenizer: None if the bundle has none; the row then has ids and no text.
            prefix: the precomputed beginning of the prompt, if any.
            index: index of the prompt in the request.
        """
        self.prompt = prompt
        self.index = index
        self.prefix = prefix
        self.total = total
        self.sampler = sampler
        self.watch = Stopwatch()
        self.choices: list[Choice] = []
        self.unfed: list[int] = []
        """The last tokens of `choices`, which are not in the KV cache yet."""
        self.forced = 0
        """Number of tokens that a grammar forced, taken without logits."""
        self.drafted = self.accepted = 0
        """Number of draft tokens, and of those accepted."""
        self.cached = length_of(prefix)
        """Number of prompt tokens whose keys and values were reused."""
        self.finish_reason: FinishReason | None = None
        self._eos = options.active_eos
        self._keeps_logprobs = options.logprobs is not None
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._matcher = StopMatcher(options.stop)
        self._pieces: list[str] = []
        self._told = 0
        """Number of tokens already returned with a piece."""

    @property
    def unread_prompt(self) -> IntArray:
        """The tokens of the prompt that are not reused: int64 [m], m at least 1."""
        return self.prompt[self.cached :]

    def advance(self, logits: RowLogits) -> Piece:
        """Choose the next token, then append the tokens that a grammar forces after it.

        Does nothing while earlier tokens are still `unfed`.

        Args:
            logits: the logits after the last token; not read while tokens are `unfed`.

        Returns:
            The text that no later token changes, often ""; all pieces together are the text of
            the completion.
        """
        if self.unfed:
            return Piece("")
        text = self._push(self.sampler.pick(logits))
        for token in [] if self._has_ended else self.sampler.forced():
            text += self._push(self.sampler.take(token))
            self.forced += 1
            if self._has_ended:
                break
        return self._given(text)

    @property
    def _has_ended(self) -> bool:
        return self.finish_reason is not None

    def next_tokens(self, most: int) -> list[int]:
        """Remove and return the first `most` tokens of `unfed`, for the model to compute."""
        tokens, self.unfed = self.unfed[:most], self.unfed[most:]
        return tokens

    def _push(self, choice: Choice) -> str:
        self.watch.last = self.watch.seconds()
        if not self.choices:
            self.watch.first = self.watch.last
        self.choices.append(choice)
        self.unfed.append(choice.token)
        piece = self._matcher.push(self._decoder.push(choice.token)) if self._decoder else ""
        has_ended = choice.token in self._eos or self._matcher.found is not None
        if has_ended or self.sampler.is_complete:
            self.finish_reason = "stop"
        elif len(self.prompt) + len(self.choices) >= self.total:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._held_back()
        return piece

    def cancel(self) -> Piece:
        """End the row as "cancelled"; returns the text that was held back."""
        self.finish_reason = "cancelled"
        return self._given(self._held_back())

    def _given(self, text: str) -> Piece:
        if not text:
            return Piece("")  # its tokens are returned with the next text
        self._pieces.append(text)
        told, self._told = self._told, len(self.choices)
        return Piece(text, self.choices[told:])

    def _held_back(self) -> str:
        if self._decoder is None:
            return ""
        return self._matcher.push(self._decoder.finish()) + self._matcher.finish()

    def completion(self) -> Completion:
        """The result of a row that has ended."""
        assert self.finish_reason is not None
        return Completion(
            text="".join(self._pieces) if self._decoder else None,
            token_ids=tuple(choice.token for choice in self.choices),
            prompt_token_ids=tuple(self.prompt.tolist()),
            finish_reason="stop" if self._matcher.found is not None else self.finish_reason,
            stop=self._matcher.found,
            timings=self.watch.timings(
                len(self.choices),
                drafted=self.drafted,
                accepted=self.accepted,
                forced=self.forced,
                cached=self.cached,
            ),
            logprobs=tuple(self.choices) if self._keeps_logprobs else None,
        )


def make_rows(
    model: CachedModel,
    prompt: IntArray,
    options: GenerationOptions,
    total: int,
    index: int,
    prefix: Prefix | None = None,
    first_copy: int = 0,
) -> list[Row]:
    """The `num_return_sequences` rows of a prompt; nothing is computed yet.

    Args:
        model: its tokenizer decodes the text.
        prompt: int64 [n], the prefix included.
        options: the options of the request.
        total: most tokens of prompt and continuation together.
        index: index of the prompt in the request; chooses its seed.
        prefix: the precomputed beginning of the prompt, if any.
        first_copy: index of the first row among all continuations of the prompt, for its draws.
    """
    rows = []
    for copy in range(first_copy, first_copy + options.num_return_sequences):
        generator = row_generator(options.seed, index, copy)
        sampler = RowSampler(options, prompt, generator, total)
        rows.append(Row(prompt, options, sampler, total, model.tokenizer, prefix, index))
    return rows


def cancelled_completions(
    model: CachedModel, prompt: IntArray, options: GenerationOptions
) -> list[Completion]:
    """Completions without tokens, for a prompt cancelled before it began."""
    rows = make_rows(model, prompt, options, len(prompt), 0)
    for row in rows:
        row.cancel()
    return [row.completion() for row in rows]


def total_lengths(
    model: CachedModel, prompts: Sequence[IntArray], options: GenerationOptions
) -> list[int]:
    """Most tokens of each prompt and its continuation together; errors name the prompt."""
    most = model.manifest.max_length
    return of_each(prompts, lambda ids: options.total_length(len(ids), most))
