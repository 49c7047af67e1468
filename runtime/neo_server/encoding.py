"""The prompts of a request as token ids, each with room for what is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.errors import ContextLengthError
from neo_runtime.text.prompts import of_each

from neo_server.asked import refuse_alternatives
from neo_server.errors import bad_request

if TYPE_CHECKING:
    import numpy as np
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from numpy.typing import NDArray

    from neo_server.asked import Asked

__all__ = ["encoded"]

_MOST_SHORTENED = 2**18
"""Characters of a text of which only the last tokens are kept. All of it is tokenized, which takes
250 bytes for each: a client could fill the memory with a few texts of megabytes."""


def encoded(
    model: Model, asked: Asked, chosen: GenerationOptions, max_length: int
) -> list[NDArray[np.int64]]:
    """Ids of all prompts.

    Args:
        model: with a tokenizer.
        asked: the request.
        chosen: its options.
        max_length: tokens of a prompt and its continuation that the server takes.

    Raises:
        ApiError: more log probabilities than an answer may have, or no room for a prompt.
        ContextLengthError: a prompt is too long.
    """
    assert model.tokenizer is not None
    longest = max_length * model.tokenizer.longest_token
    kept = _kept(asked, max_length)
    prompts = (
        _whole(model, asked, longest, max_length)
        if kept is None
        else _ends(model, asked, kept, max(longest, _MOST_SHORTENED))
    )
    refuse_alternatives(asked, [len(ids) for ids in prompts])
    for ids in prompts:
        if asked.max_tokens:
            chosen.total_length(len(ids), max_length, "the server")
        elif len(ids) > max_length:
            raise ContextLengthError(
                f"a prompt has {len(ids)} tokens and the server {max_length} positions; shorten it"
            )
    return prompts


def _whole(model: Model, asked: Asked, longest: int, max_length: int) -> list[NDArray[np.int64]]:
    for prompt in asked.prompts:
        if len(prompt) > longest:  # which need not be tokenized to know
            raise ContextLengthError(
                f"a prompt of {len(prompt)} characters or tokens has more than the {max_length} "
                "tokens that this server takes; shorten it"
            )
    return model.encode_prompts(asked.prompts)


def _ends(model: Model, asked: Asked, kept: int, longest: int) -> list[NDArray[np.int64]]:
    """The last tokens; one prompt after the other: what is cut off is not kept meanwhile."""
    for prompt in asked.prompts:
        if isinstance(prompt, str) and len(prompt) > longest:
            raise bad_request(
                f"a prompt of {len(prompt)} characters is too long to be tokenized, expected at "
                f"most {longest}; send its end",
                "prompt",
            )
    return of_each(asked.prompts, lambda one: model.encode_prompts([one])[0][-kept:].copy())


def _kept(asked: Asked, max_length: int) -> int | None:
    """Tokens that each prompt keeps, the last ones; None: all."""
    most = asked.truncate_prompt_tokens
    if most != -1:
        return most
    room = max_length - asked.max_tokens
    if room < 1:
        raise bad_request(
            f"max_tokens is {asked.max_tokens} and the server takes {max_length} tokens: no room "
            "for a prompt",
            "max_tokens",
        )
    return room
