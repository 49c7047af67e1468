"""Tokenization of a request's prompts, and the check that prompt and continuation fit together."""

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
"""Most characters of a text that is truncated to its last tokens, unless texts that fit may have
more. The whole text is tokenized first, which takes 250 bytes of memory per character: without this
limit, a client could exhaust the memory with a few texts of several megabytes."""


def encoded(
    model: Model, asked: Asked, chosen: GenerationOptions, max_length: int
) -> list[NDArray[np.int64]]:
    """Token ids of all prompts, an array [length] for each, truncated if requested.

    Args:
        model: must have a tokenizer.
        asked: the request.
        chosen: its options.
        max_length: most tokens of a prompt and its continuation together.

    Raises:
        ApiError: (400) the answer could have too many log probabilities, `max_tokens` leaves no
            room for a prompt, or a text to be truncated is too long to be tokenized.
        ContextLengthError: a prompt, or a prompt and its continuation, is too long.
        RequestError: a prompt is empty or has an invalid token id.
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
                f"a prompt has {len(ids)} tokens, expected at most {max_length} on this server; "
                "shorten it"
            )
    return prompts


def _whole(model: Model, asked: Asked, longest: int, max_length: int) -> list[NDArray[np.int64]]:
    for prompt in asked.prompts:
        if len(prompt) > longest:  # certainly too long; no need to tokenize it
            raise ContextLengthError(
                f"a prompt of {len(prompt)} characters or token ids has more than {max_length} "
                "tokens, the most that this server accepts; shorten it"
            )
    return model.encode_prompts(asked.prompts)


def _ends(model: Model, asked: Asked, kept: int, longest: int) -> list[NDArray[np.int64]]:
    """The last `kept` tokens of each prompt.

    Prompts are tokenized one by one, so that at most one is held at full length.
    """
    for prompt in asked.prompts:
        if isinstance(prompt, str) and len(prompt) > longest:
            raise bad_request(
                f"a prompt of {len(prompt)} characters is too long to be tokenized, expected at "
                f"most {longest}; send only the end of it",
                "prompt",
            )
    return of_each(asked.prompts, lambda one: model.encode_prompts([one])[0][-kept:].copy())


def _kept(asked: Asked, max_length: int) -> int | None:
    """How many of its last tokens each prompt keeps; None: all."""
    most = asked.truncate_prompt_tokens
    if most != -1:
        return most
    room = max_length - asked.max_tokens
    if room < 1:
        raise bad_request(
            f"max_tokens is {asked.max_tokens}, which leaves no room for a prompt: this server "
            f"accepts {max_length} tokens of a prompt and its continuation; lower max_tokens",
            "max_tokens",
        )
    return room
