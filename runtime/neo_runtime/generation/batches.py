"""Generation in batches: splits prompts into batches and allocates a KV cache for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.generation.fitting import fitting_batch
from neo_runtime.generation.generator import steps
from neo_runtime.generation.rows import cancelled_completions, make_rows, total_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.options.generation_options import GenerationOptions

__all__ = ["sampled_completions"]


def sampled_completions(
    model: CachedModel,
    prompts: Sequence[NDArray[np.int64]],
    options: GenerationOptions,
    batch_size: int | None,
    should_stop: Callable[[], bool],
    prefix: Prefix | None,
) -> list[Completion]:
    """Continue each prompt; prompts of similar length share a batch.

    Args:
        model: computes the logits.
        prompts: int64 [n] each, the prefix included.
        options: for all of them.
        batch_size: prompts per batch; None: as suits the backend and the limits of memory.
        should_stop: called before each batch and after each step.
        prefix: the precomputed beginning of all prompts, if any.

    Returns:
        `num_return_sequences` completions for each prompt, in the order of the prompts.

    Raises:
        ContextLengthError: a prompt and its continuation do not fit the model.
        RequestError: the options do not fit a prompt.
        CacheLimitError: the cache for a batch would exceed the limit.
    """
    totals = total_lengths(model, prompts, options)
    copies = options.num_return_sequences
    # A batch takes neighbours of this order, which are padded to the longest.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[Completion]] = {}
    while order:
        if should_stop():
            for index in order:
                found[index] = cancelled_completions(model, prompts[index], options)
            break
        longest = model.rounded_length(totals[order[-1]] - 1)
        size = batch_size or _batch_size(model, len(order), copies, longest)
        batch, order = order[:size], order[size:]
        # The last token of a row is never fed, so it needs no position.
        length = model.rounded_length(max(totals[index] for index in batch) - 1)
        # The cache comes first: the rows take memory that no limit counts.
        with model.new_cache(len(batch) * copies, length) as cache:
            made = [
                make_rows(model, prompts[index], options, totals[index], index, prefix)
                for index in batch
            ]
            for _ in steps(model, cache, made, should_stop, len(prompts)):
                pass
        for index, rows in zip(batch, made, strict=True):
            # Keep completions, not rows: a sampler may hold an array of the vocabulary's size.
            found[index] = [row.completion() for row in rows]
    return [one for index in range(len(prompts)) for one in found[index]]


def _batch_size(model: CachedModel, prompts: int, copies: int, length: int) -> int:
    """The default number of prompts in the next batch, such that batches are of similar size."""
    if prompts == 1:  # the usual case: no need to query the system's memory
        return 1
    size = fitting_batch(model, max(1, model.default_batch // copies), length, each=copies)
    return -(-prompts // -(-prompts // size))
