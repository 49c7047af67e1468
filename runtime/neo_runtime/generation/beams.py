"""Beam search over prompts, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.errors import RequestError
from neo_runtime.generation.completion import Completion
from neo_runtime.generation.one_by_one import one_by_one
from neo_runtime.generation.prefix import behind, length_of
from neo_runtime.generation.rows import Stopwatch
from neo_runtime.generation.text_stream import StopMatcher
from neo_runtime.sampling.beam_search import BeamSearch
from neo_runtime.sampling.grammar_rule import GrammarRule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.completion import FinishReason
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.sampling.beam_search import BeamResult
    from neo_runtime.sampling.scores import IntArray
    from neo_runtime.text.tokenizer import Tokenizer


__all__ = ["searched_completions"]


def searched_completions(
    model: CachedModel,
    prompts: Sequence[IntArray],
    options: GenerationOptions,
    should_stop: Callable[[], bool],
    prefix: Prefix | None,
) -> list[Completion]:
    """The best `num_return_sequences` hypotheses of each prompt, best first.

    Arguments and errors are those of `sampled_completions`; once `should_stop` returns true, a
    search ends with its next step.
    """

    def complete(_: int, ids: IntArray, total: int) -> list[Completion]:
        return _best(model, ids, total, options, should_stop, prefix)

    return one_by_one(model, prompts, options, should_stop, complete)


def _best(
    model: CachedModel,
    prompt: IntArray,
    total: int,
    options: GenerationOptions,
    should_stop: Callable[[], bool],
    prefix: Prefix | None,
) -> list[Completion]:
    model.prepare()  # before the clock starts
    watch = Stopwatch()
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
            # The prompt is in the cache once, for all beams: expand it at the first step.
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
    """A check for stop strings in a hypothesis, at the same token as in greedy decoding.

    None if there is nothing to check.
    """
    if tokenizer is None or not options.stop:
        return None

    def is_stopped(ids: IntArray) -> bool:
        text = tokenizer.decode(ids[len(prompt) :].tolist())
        # Text that ends inside a character may still change with the next token.
        return not text.endswith("\ufffd") and any(stop in text for stop in options.stop)

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
    if options.grammar is not None and not has_ended:  # at a limit, the text may still be complete
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
