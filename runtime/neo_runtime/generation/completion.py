"""The result of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from neo_runtime.sampling.choice import Choice

__all__ = ["Completion", "FinishReason", "Timings"]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock seconds of the batch that a completion was part of, up to its own last token."""

    prefill_seconds: float
    """From the start to the logits of all prompts of the batch."""
    time_to_first_token: float
    """From the start to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    tokens_per_second: float
    """Tokens of this completion after the first / `decode_seconds`; 0 with one token."""
    draft_tokens: int = 0
    """Tokens that a drafter guessed."""
    accepted_draft_tokens: int = 0
    """Those of them that were right."""
    forced_tokens: int = 0
    """Tokens that a grammar left no choice of, taken without logits."""
    cached_prompt_tokens: int = 0
    """Tokens of the prompt that were not computed for it: a prefix, or what a `Scheduler` kept."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of one prompt."""

    text: str | None
    """The continuation, cut before a stop string; None if the bundle has no tokenizer."""
    token_ids: tuple[int, ...]
    """The generated ids, with the end-of-sequence token or the tokens of the stop string."""
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    """"stop": an end-of-sequence token or a stop string; "length": a limit was reached;
    "cancelled": `should_stop` said so."""
    stop: str | None
    """The stop string that was found."""
    timings: Timings
    logprobs: tuple[Choice, ...] | None = None
    """One per generated token, if the option `logprobs` is set."""
    score: float | None = None
    """Of beam search: sum of log probabilities / (tokens ** length_penalty)."""
