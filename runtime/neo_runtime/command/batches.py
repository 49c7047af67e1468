"""Many prompts, batch by batch: one is out of the house before the next is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Drafter
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.text.prompts import Prompt

__all__ = ["Batch", "batches"]

Batch = list[tuple[int, "Completion"]]
"""Places of the prompts, and their completions."""


def batches(
    model: Model,
    prompts: Sequence[Prompt],
    chosen: GenerationOptions,
    size: int | None,
    *,
    bad_words: Sequence[str] = (),
    prefix: Prefix | None = None,
    drafter: Drafter | None = None,
) -> Iterator[Batch]:
    """Complete prompts in their order, each as `Model.generate` does with all of them.

    Args:
        model: the model.
        prompts: text or token ids.
        chosen: the options, without a seed for each prompt.
        size: prompts computed together; None for as many as `Model.generate` takes.
        bad_words: as for `Model.generate`.
        prefix: as for `Model.generate`.
        drafter: as for `Model.generate`.

    Raises:
        RequestError: a prompt or an option that cannot be honoured: before any is computed.
        NeoError: see `Model.generate`.
    """
    # Only now what imports numpy: --help does without.
    from neo_runtime.options.values import count
    from neo_runtime.text.prompts import of_each, prompt_ids

    count(1, optional=True)("batch_size", size)

    def checked(prompt: Prompt) -> list[int]:
        ids = prompt_ids(prompt, model.manifest.model.vocab_size, model.tokenizer)
        known = 0 if prefix is None else len(prefix.ids)
        chosen.total_length(known + len(ids), model.manifest.max_length)
        found: list[int] = ids.tolist()
        return found

    rows = of_each(prompts, checked)
    copies = chosen.num_return_sequences
    if chosen.num_beams > 1 or drafter is not None:
        size = 1  # which compute prompts alone
    step = size or max(1, model.default_batch // copies)
    for start in range(0, len(rows), step):
        batch = rows[start : start + step]
        completions = model.generate(
            batch,
            chosen,
            bad_words=bad_words,
            batch_size=size,
            prefix=prefix,
            drafter=drafter,
        )
        yield [(start + place // copies, one) for place, one in enumerate(completions)]
