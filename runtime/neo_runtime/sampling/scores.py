"""Scores of a row: types, log-softmax, and the check that a token can be chosen."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from neo_runtime.errors import RequestError, VerificationError

__all__ = ["FloatArray", "IntArray", "log_softmax", "overflowed", "usable_maximum"]

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float32]


def log_softmax(scores: FloatArray) -> FloatArray:
    """Log-softmax over the last axis, [..., V] → [..., V], of the same dtype."""
    with np.errstate(divide="ignore"):
        shifted = scores - scores.max(axis=-1, keepdims=True)
        normalized: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


def usable_maximum(scores: FloatArray) -> float:
    """The largest of `scores`, if a token can be chosen from them.

    Raises:
        VerificationError: a score is NaN or +inf.
        RequestError: all scores are -inf.
    """
    top = float(scores.max())
    if np.isnan(top) or top == np.inf:
        raise VerificationError(
            f"the model's logits hold {top}, expected finite numbers; the weights or the "
            "precision overflow: export again with --fp32 and --verify"
        )
    if top == -np.inf:
        raise RequestError(
            "the options forbid every token here; relax grammar, bad_words_ids, suppress_tokens, "
            "logit_bias, logits_processor, no_repeat_ngram_size or min_new_tokens"
        )
    return top


def overflowed() -> RequestError:
    """The error for finite logits that the options turned into infinity or NaN."""
    return RequestError(
        "the options take scores beyond float32; use smaller numbers for logit_bias, "
        "sequence_bias, presence_penalty, frequency_penalty, repetition_penalty, "
        "exponential_decay_length_penalty or temperature"
    )
