"""Prompts continued one after the other, each in a KV cache of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.generation.rows import cancelled_completions, total_lengths
from neo_runtime.text.prompts import named_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.completion import Completion
    from neo_runtime.options.generation_options import GenerationOptions

__all__ = ["one_by_one"]


def one_by_one(
    model: CachedModel,
    prompts: Sequence[NDArray[np.int64]],
    options: GenerationOptions,
    should_stop: Callable[[], bool],
    complete: Callable[[int, NDArray[np.int64], int], list[Completion]],
) -> list[Completion]:
    """The completions of all prompts, in their order.

    Args:
        model: computes the logits.
        prompts: int64 [n] each, the prefix included.
        options: for all of them.
        should_stop: called before each prompt.
        complete: (index of the prompt, its token ids, most tokens of prompt and continuation
            together) → its completions.

    Raises:
        ContextLengthError: a prompt and its continuation do not fit the model; raised before any
            prompt is computed.
        RequestError: a prompt failed; the message names it.
    """
    totals = total_lengths(model, prompts, options)
    found: list[Completion] = []
    for index, (ids, total) in enumerate(zip(prompts, totals, strict=True)):
        if should_stop():
            found += cancelled_completions(model, ids, options)
        else:
            with named_prompt(index, len(prompts)):
                found += complete(index, ids, total)
    return found
