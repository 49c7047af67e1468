"""Consistency of generation options, with each other and with a model's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from neo_runtime.options.generation_options import GenerationOptions

__all__ = ["check_vocabulary", "refuse_contradictions"]


def refuse_contradictions(options: GenerationOptions) -> None:
    """Refuse options that contradict each other.

    Raises:
        RequestError: the message names them.
    """
    if options.num_beams > 1 and options.do_sample:
        raise RequestError(
            f"num_beams is {options.num_beams} and do_sample is True, but beam search here does "
            "not sample; set do_sample=False or num_beams=1"
        )
    if options.num_beams > 1 and options.logprobs is not None:
        raise RequestError(
            f"logprobs is {options.logprobs} and num_beams is {options.num_beams}, but beam search "
            "reports only one score per sequence; set logprobs=None or num_beams=1"
        )
    if options.num_beams == 1 and options.num_return_sequences > 1 and not options.do_sample:
        raise RequestError(
            f"num_return_sequences is {options.num_return_sequences}, but greedy decoding has "
            "one result; turn do_sample on, or set num_beams to at least that number"
        )
    if 1 < options.num_beams < options.num_return_sequences:
        raise RequestError(
            f"num_return_sequences is {options.num_return_sequences}, expected at most "
            f"num_beams ({options.num_beams}); lower the one or raise the other"
        )
    for low, high in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        least, most = getattr(options, low), getattr(options, high)
        overridden = low == "min_length" and (
            options.min_new_tokens is not None or options.max_new_tokens is not None
        )
        if least is not None and most is not None and least > most and not overridden:
            raise RequestError(
                f"{low} is {least} and {high} is {most}; set {low} to at most {most}"
            )
    forced = set(options.forced_eos_token_id)
    if forced and forced <= set(options.suppress_tokens):
        raise RequestError(
            f"forced_eos_token_id {sorted(forced)} is suppressed by suppress_tokens, which "
            "leaves no token for the last position; remove one of the two"
        )
    if options.grammar is not None and options.forced_eos_token_id:
        raise RequestError(
            "forced_eos_token_id would cut a text that has not the form of the grammar; leave one "
            "of them out"
        )
    # If eos_token_id is None, the model's own is set later, and this check runs again.
    is_known = options.eos_token_id is not None or options.ignore_eos
    is_endless = is_known and not options.active_eos
    if options.grammar is not None and options.num_beams > 1 and is_endless:
        raise RequestError(
            "beam search ends a text with a grammar by end of sequence, and there is no "
            "eos_token_id; give one, or set num_beams=1"
        )


def check_vocabulary(options: GenerationOptions, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    End-of-sequence ids are not checked: one that is never generated does no harm.

    Raises:
        RequestError: the message names the option and the id.
    """
    used: dict[str, list[int]] = {
        "logit_bias": list(options.logit_bias),
        "bad_words_ids": [i for ids in options.bad_words_ids for i in ids],
        "sequence_bias": [i for ids, _ in options.sequence_bias for i in ids],
        "suppress_tokens": list(options.suppress_tokens),
        "begin_suppress_tokens": list(options.begin_suppress_tokens),
        "forced_eos_token_id": list(options.forced_eos_token_id),
    }
    for name, ids in used.items():
        if ids and max(ids) >= vocab_size:
            raise RequestError(
                f"{name} names token {max(ids)}, but the model has {vocab_size} tokens "
                f"(0 to {vocab_size - 1}); use ids of this model's tokenizer"
            )
