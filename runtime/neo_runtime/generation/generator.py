"""The generation loop: prefill once, then one token per row and step until every row has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.errors import RequestError
from neo_runtime.generation.completion import Completion
from neo_runtime.generation.feeding import feed
from neo_runtime.generation.prefix import behind, length_of
from neo_runtime.generation.rows import Stopwatch
from neo_runtime.generation.text_stream import StopMatcher
from neo_runtime.sampling.beam_search import BeamSearch
from neo_runtime.sampling.grammar_rule import GrammarRule

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.completion import FinishReason
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.generation.rows import Row
    from neo_runtime.generation.text_stream import Piece
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.sampling.beam_search import BeamResult
    from neo_runtime.text.tokenizer import Tokenizer

    IntArray = NDArray[np.int64]

__all__ = ["beam_completions", "fill_holes", "never", "read_prompts", "steps"]


def never() -> bool:
    """What `should_stop` is where nobody wants to stop."""
    return False


def steps(
    model: CachedModel,
    cache: KVCache,
    groups: Sequence[Sequence[Row]],
    should_stop: Callable[[], bool],
) -> Generator[list[Piece], None, None]:
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
    logits = read_prompts(model, cache, groups)
    while True:
        yield [row.advance(scores) for row, scores in zip(rows, logits, strict=True)]
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
        logits = feed(model, cache, rows, model.prefill_chunk)


def read_prompts(model: CachedModel, cache: KVCache, groups: Sequence[Sequence[Row]]) -> StepLogits:
    """Start the rows' clocks, and compute what is new of their prompts; see `steps`."""
    rows = [row for group in groups for row in group]
    for row in rows:
        row.watch = Stopwatch()
    cache.reorder(range(len(groups)))
    if (prefix := rows[0].prefix) is not None:
        prefix.fill(cache, range(len(groups)))
    logits = model.prefill_step(cache, [row.unread_prompt for [row, *_] in groups])
    copies = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    if len(copies) > len(groups):
        cache.reorder(copies)
        logits = logits.take(copies)
    for row in rows:
        row.watch.prefill = row.watch.seconds()
    return logits


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
    prefix: Prefix | None = None,
) -> list[Completion]:
    """Beam search for one prompt: the best `num_return_sequences` hypotheses, best first.

    Args:
        model: computes the logits.
        prompt: int64 [n], the prefix included.
        options: what was asked for.
        should_stop: asked after each step; the search ends with the next one.
        prefix: what the prompt begins with, if that is computed already.

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
        if prefix is not None:
            prefix.fill(cache, [0])
        logits = model.prefill(cache, [behind(prefix, prompt)])
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
    cached = length_of(prefix)
    return [
        _beam_completion(model.tokenizer, prompt, options, result, watch, cached, other_end)
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
    cached: int,
    other_end: FinishReason,
) -> Completion:
    matcher = StopMatcher(options.stop)
    text = None
    if tokenizer is not None:
        text = matcher.push(tokenizer.decode(result.token_ids)) + matcher.finish()
    has_ended = matcher.found is not None or result.token_ids[-1] in options.active_eos
    if options.grammar is not None and not has_ended:  # at a limit, where it may be a whole text
        rule = GrammarRule(options.grammar, (), prompt_length=0)
        has_ended = rule.is_complete(np.array(result.token_ids))
    return Completion(
        text=text,
        token_ids=result.token_ids,
        prompt_token_ids=tuple(prompt.tolist()),
        finish_reason="stop" if has_ended else other_end,
        stop=matcher.found,
        timings=watch.timings(len(result.token_ids), cached=cached),
        score=result.score,
    )
