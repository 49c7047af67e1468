"""Builds the logits processors for given options, in the order of Hugging Face `generate`.

Order (`GenerationMixin._get_logits_processor`, transformers 5): sequence_bias,
repetition_penalty, no_repeat_ngram_size, bad_words_ids, min_length / min_new_tokens,
forced_eos_token_id, remove_invalid_values, exponential_decay_length_penalty, suppress_tokens,
begin_suppress_tokens. Then, where `generate` puts custom processors, those that it does not have:
presence and frequency penalty, logit_bias, logits_processor, grammar. Then `warpers`; then
renormalize_logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neo_runtime.sampling.custom_processor import CustomProcessor
from neo_runtime.sampling.grammar_rule import GrammarRule
from neo_runtime.sampling.processors import (
    CountPenalty,
    ExponentialDecay,
    ForcedEos,
    LogitBias,
    MinLength,
    NoRepeatNGram,
    RemoveInvalidValues,
    RepetitionPenalty,
    SequenceBias,
    SuppressTokens,
)

if TYPE_CHECKING:
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.sampling.processors import LogitsProcessor

__all__ = ["build_processors"]


def build_processors(
    options: GenerationOptions, prompt_length: int, max_length: int
) -> list[LogitsProcessor]:
    """The processors for `options`, in order, without warpers and renormalization.

    Args:
        options: the options; `active_eos` are the end-of-sequence ids.
        prompt_length: tokens of the prompt.
        max_length: most tokens of prompt and continuation together.
    """
    eos = options.active_eos
    rules: list[LogitsProcessor] = []
    if options.sequence_bias:
        rules.append(SequenceBias(options.sequence_bias))
    if options.repetition_penalty != 1.0:
        rules.append(RepetitionPenalty(options.repetition_penalty))
    if options.no_repeat_ngram_size > 0:
        rules.append(NoRepeatNGram(options.no_repeat_ngram_size))
    # As in `generate`: a bad word that is an end-of-sequence token is ignored.
    bad_words = [ids for ids in options.bad_words_ids if len(ids) > 1 or ids[0] not in eos]
    if bad_words:
        rules.append(SequenceBias([(ids, -np.inf) for ids in dict.fromkeys(bad_words)]))
    minimum = options.minimum_length(prompt_length)
    if eos and minimum > prompt_length:
        rules.append(MinLength(minimum, eos))
    rules += _late_processors(options, prompt_length, max_length)
    if options.presence_penalty or options.frequency_penalty:
        rules.append(
            CountPenalty(options.presence_penalty, options.frequency_penalty, prompt_length)
        )
    if options.logit_bias:
        rules.append(LogitBias(list(options.logit_bias), list(options.logit_bias.values())))
    rules += [CustomProcessor(function) for function in options.logits_processor]
    if options.grammar is not None:
        rules.append(GrammarRule(options.grammar, eos, prompt_length))
    return rules


def _late_processors(
    options: GenerationOptions, prompt_length: int, max_length: int
) -> list[LogitsProcessor]:
    """From forced_eos_token_id to begin_suppress_tokens."""
    rules: list[LogitsProcessor] = []
    if options.forced_eos_token_id:
        rules.append(ForcedEos(max_length, options.forced_eos_token_id))
    if options.remove_invalid_values:
        rules.append(RemoveInvalidValues())
    if options.exponential_decay_length_penalty is not None and options.active_eos:
        start, factor = options.exponential_decay_length_penalty
        rules.append(ExponentialDecay(start, factor, options.active_eos, prompt_length))
    if options.suppress_tokens:
        rules.append(SuppressTokens(options.suppress_tokens))
    if options.begin_suppress_tokens:
        rules.append(SuppressTokens(options.begin_suppress_tokens, at=prompt_length))
    return rules
