"""Checks of guessed tokens, on any backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.hf_reference import varied_prompts
from neo_runtime import DraftModel, PromptLookup

if TYPE_CHECKING:
    from neo_runtime import Model


def assert_guesses_change_nothing(model: Model, tolerance: float) -> None:
    """Guessing leaves log probabilities unchanged until the texts diverge, as near ties may.

    Args:
        model: of the demo checkpoint.
        tolerance: largest difference of a log probability, in nats.
    """
    options: dict[str, Any] = {"max_new_tokens": 40, "logprobs": 0}
    guessed = 0
    for prompt in varied_prompts(5):
        alone = model.generate(prompt, **options)
        for drafter in (PromptLookup(), DraftModel(model, 4)):
            found = model.generate(prompt, drafter=drafter, **options)
            guessed += found.timings.accepted_draft_tokens
            assert found.logprobs is not None
            assert alone.logprobs is not None
            for one, other in zip(found.logprobs, alone.logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=tolerance)
                if one.token != other.token:
                    break
    assert guessed > 40
