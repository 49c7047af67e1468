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
    """Wall-clock seconds of the completion's batch, up to the completion's own last token.

    The start is that of the batch; with a `Scheduler`, the call of `submit`.
    """

    prefill_seconds: float
    """From the start to the logits of all prompts of the batch."""
    time_to_first_token: float
    """From the start to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    tokens_per_second: float
    """Tokens of this completion after the first / `decode_seconds`; 0 with one token."""
    draft_tokens: int = 0
    """Draft tokens that a drafter proposed."""
    accepted_draft_tokens: int = 0
    """Draft tokens that were accepted."""
    forced_tokens: int = 0
    """Tokens that were the only ones a grammar allowed, taken without logits."""
    cached_prompt_tokens: int = 0
    """Prompt tokens reused from a prefix or the prefix cache of a `Scheduler`, not computed."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of one prompt."""

    text: str | None
    """The continuation, cut before a stop string; None if the bundle has no tokenizer."""
    token_ids: tuple[int, ...]
    """The generated ids, including the end-of-sequence token or the tokens of the stop string."""
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    """"stop": an end-of-sequence token, a stop string or the end of a grammar; "length": a limit
    was reached; "cancelled": `should_stop` returned true, or a `Scheduler` was closed early."""
    stop: str | None
    """The stop string that was found, if any."""
    timings: Timings
    logprobs: tuple[Choice, ...] | None = None
    """One per generated token, if the option `logprobs` is set."""
    score: float | None = None
    """With beam search: sum of log probabilities / (tokens ** length_penalty); else None."""
