"""The generation loop: prefill once, then one token per row and step until every row has ended."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.beam_search import BeamSearch
from neo_runtime.completion import Completion, Timings
from neo_runtime.errors import RequestError
from neo_runtime.sampling import RowSampler, row_generator
from neo_runtime.text_stream import StopMatcher, StreamDecoder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray

    from neo_runtime.beam_search import BeamResult
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.completion import FinishReason
    from neo_runtime.kv_cache import KVCache
    from neo_runtime.options import GenerationOptions
    from neo_runtime.sampling import Choice
    from neo_runtime.tokenizer import Tokenizer

    IntArray = NDArray[np.int64]

__all__ = ["Row", "beam_completions", "cancelled_rows", "fill_holes", "make_rows", "never", "steps"]


def never() -> bool:
    """What `should_stop` is where nobody wants to stop."""
    return False


class Stopwatch:
    """Times in seconds since the start."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self.prefill = self.first = self.last = 0.0

    def seconds(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start

    def timings(self, tokens: int) -> Timings:
        """Summary for a completion of this many tokens."""
        decode = self.last - self.first
        return Timings(
            prefill_seconds=self.prefill,
            time_to_first_token=self.first,
            decode_seconds=decode,
            tokens_per_second=(tokens - 1) / decode if tokens > 1 and decode > 0 else 0.0,
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
    ) -> None:
        """Begin with nothing generated.

        Args:
            prompt: int64 [n].
            options: what was asked for.
            sampler: the row's own.
            total: tokens of prompt and continuation together, at most.
            tokenizer: None where there is no text, only ids.
        """
        self.prompt = prompt
        self.total = total
        self.sampler = sampler
        self.watch = Stopwatch()
        self.choices: list[Choice] = []
        self.finish_reason: FinishReason | None = None
        self._eos = options.active_eos
        self._keeps_logprobs = options.logprobs is not None
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._matcher = StopMatcher(options.stop)
        self._pieces: list[str] = []

    def push(self, choice: Choice) -> str:
        """Take the next token.

        Returns:
            The text that is now certain, often ""; all pieces together are the completion's text.
        """
        self.watch.last = self.watch.seconds()
        if not self.choices:
            self.watch.first = self.watch.last
        self.choices.append(choice)
        piece = self._matcher.push(self._decoder.push(choice.token)) if self._decoder else ""
        if choice.token in self._eos or self._matcher.found is not None:
            self.finish_reason = "stop"
        elif len(self.prompt) + len(self.choices) >= self.total:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._held_back()
        self._pieces.append(piece)
        return piece

    def cancel(self) -> str:
        """End here, as the caller wants no more; the text that was held back."""
        self.finish_reason = "cancelled"
        self._pieces.append(self._held_back())
        return self._pieces[-1]

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
            timings=self.watch.timings(len(self.choices)),
            logprobs=tuple(self.choices) if self._keeps_logprobs else None,
        )


def make_rows(
    model: CachedModel, prompt: IntArray, options: GenerationOptions, total: int, index: int
) -> list[Row]:
    """The rows of a prompt, `num_return_sequences` of them; nothing is computed yet.

    Args:
        model: whose tokenizer makes the text.
        prompt: int64 [n].
        options: what was asked for.
        total: tokens of prompt and continuation together, at most.
        index: of the prompt among those of the request; chooses its seed.
    """
    rows = []
    for copy in range(options.num_return_sequences):
        generator = row_generator(options.seed, index, copy)
        sampler = RowSampler(options, prompt, generator, total)
        rows.append(Row(prompt, options, sampler, total, model.tokenizer))
    return rows


def cancelled_rows(model: CachedModel, prompt: IntArray, options: GenerationOptions) -> list[Row]:
    """The rows of a prompt that nobody waits for any more: without a token."""
    rows = make_rows(model, prompt, options, len(prompt), 0)
    for row in rows:
        row.cancel()
    return rows


def steps(
    model: CachedModel,
    cache: KVCache,
    groups: Sequence[Sequence[Row]],
    should_stop: Callable[[], bool],
) -> Generator[list[str], None, None]:
    """Continue all rows together; each step yields the pieces of the rows still active.

    Rows that have ended leave the batch.

    Args:
        model: computes the logits.
        cache: empty, for all rows.
        groups: the rows of each prompt: as many for every prompt.
        should_stop: asked after each step; rows that are still active end as "cancelled".
    """
    rows = [row for group in groups for row in group]
    if any(row.total > len(row.prompt) + 1 for row in rows):
        model.prepare()  # before the clocks start; decode is not needed for one token
    for row in rows:
        row.watch = Stopwatch()
    cache.reorder(range(len(groups)))
    logits = model.prefill_step(cache, [group[0].prompt for group in groups])
    copies = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    if len(copies) > len(groups):
        cache.reorder(copies)
        logits = logits.take(copies)
    for row in rows:
        row.watch.prefill = row.watch.seconds()
    while True:
        yield [row.push(row.sampler.pick(scores)) for row, scores in zip(rows, logits, strict=True)]
        active = [index for index, row in enumerate(rows) if row.finish_reason is None]
        if not active:
            return
        if should_stop():
            yield [rows[index].cancel() for index in active]
            return
        if len(active) < len(rows):
            active = fill_holes(active)
            cache.reorder(active)
            rows = [rows[index] for index in active]
        logits = model.decode_step(cache, [row.choices[-1].token for row in rows])


def fill_holes(active: Sequence[int]) -> list[int]:
    """An order of the active rows that leaves in place as many as possible: the fewest copies."""
    count = len(active)
    staying = {index for index in active if index < count}
    moving = iter([index for index in active if index >= count])
    return [index if index in staying else next(moving) for index in range(count)]


def beam_completions(
    model: CachedModel,
    prompt: IntArray,
    options: GenerationOptions,
    should_stop: Callable[[], bool],
) -> list[Completion]:
    """Beam search for one prompt: the best `num_return_sequences` hypotheses, best first.

    Args:
        model: computes the logits.
        prompt: int64 [n].
        options: what was asked for.
        should_stop: asked after each step; the search ends with the next one.

    Raises:
        ContextLengthError: the prompt and what was asked for do not fit the model.
        RequestError: the options forbid every continuation.
    """
    model.prepare()  # before the clock starts
    watch = Stopwatch()
    total = options.total_length(len(prompt), model.manifest.max_length)
    with model.new_cache(options.num_beams, model.rounded_length(total - 1)) as cache:
        search = BeamSearch(options, prompt, total, _stop_check(model.tokenizer, prompt, options))
        cache.reorder([0])
        logits = model.prefill(cache, [prompt])
        watch.prefill = watch.seconds()
        step = search.step(logits)
        watch.first = watch.seconds()
        while step is not None:
            if should_stop():
                search.end_soon()
            parents, tokens = step
            # All beams were the prompt at first, and the cache has it once.
            cache.reorder(parents if cache.batch > 1 else np.zeros_like(parents))
            step = search.step(model.decode(cache, tokens))
    watch.last = watch.seconds()
    results = search.results()
    if not results:
        raise RequestError(
            "the options exclude every continuation; relax bad_words_ids, suppress_tokens or "
            "no_repeat_ngram_size"
        )
    other_end: FinishReason = "cancelled" if search.ends_early else "length"
    return [
        _beam_completion(model.tokenizer, prompt, options, result, watch, other_end)
        for result in results
    ]


def _stop_check(
    tokenizer: Tokenizer | None, prompt: IntArray, options: GenerationOptions
) -> Callable[[IntArray], bool] | None:
    """Whether a hypothesis ends with a token that completes a stop string."""
    if tokenizer is None or not options.stop:
        return None
    # A token has at least one byte, and hypotheses that held a stop string before have ended.
    tail = max(len(stop.encode()) for stop in options.stop)

    def is_stopped(ids: IntArray) -> bool:
        text = tokenizer.decode(ids[len(prompt) :][-tail:].tolist())
        return any(stop in text for stop in options.stop)

    return is_stopped


def _beam_completion(
    tokenizer: Tokenizer | None,
    prompt: IntArray,
    options: GenerationOptions,
    result: BeamResult,
    watch: Stopwatch,
    other_end: FinishReason,
) -> Completion:
    matcher = StopMatcher(options.stop)
    text = None
    if tokenizer is not None:
        text = matcher.push(tokenizer.decode(result.token_ids)) + matcher.finish()
    has_ended = matcher.found is not None or result.token_ids[-1] in options.active_eos
    return Completion(
        text=text,
        token_ids=result.token_ids,
        prompt_token_ids=tuple(prompt.tolist()),
        finish_reason="stop" if has_ended else other_end,
        stop=matcher.found,
        timings=watch.timings(len(result.token_ids)),
        score=result.score,
    )
