"""Complete many prompts with continuous batching; completions are yielded as soon as possible."""

from __future__ import annotations

from collections import deque
from threading import Semaphore
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Drafter
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.scheduling.pending import PendingCompletion
    from neo_runtime.text.prompts import Prompt

__all__ = ["completed"]


def completed(
    model: Model,
    prompts: Sequence[Prompt],
    chosen: GenerationOptions,
    size: int | None,
    *,
    bad_words: Sequence[str] = (),
    prefix: Prefix | None = None,
    drafter: Drafter | None = None,
) -> Generator[tuple[int, Completion], None, None]:
    """Complete the prompts, and yield the completions in the order of the prompts.

    Args:
        model: the model.
        prompts: text or token ids.
        chosen: the options, without a seed for each prompt.
        size: batch size; None for the model's default. With beams or a drafter, prompts are
            computed one by one.
        bad_words: as for `Model.generate`.
        prefix: as for `Model.generate`.
        drafter: as for `Model.generate`.

    Yields:
        The index of a prompt and one of its completions, once all earlier prompts are done.

    Raises:
        RequestError: a prompt or an option is invalid; raised before any is computed.
        NeoError: see `Model.generate`.
    """
    # Only now what imports numpy: --help does without.
    from neo_runtime.text.prompts import of_each, prompt_ids

    known = 0 if prefix is None else len(prefix.ids)

    def checked(prompt: Prompt) -> tuple[list[int], int]:
        ids = prompt_ids(prompt, model.manifest.model.vocab_size, model.tokenizer)
        return ids.tolist(), chosen.total_length(known + len(ids), model.manifest.max_length)

    found = of_each(prompts, checked)
    rows, longest = [ids for ids, _ in found], max((total for _, total in found), default=0)
    if chosen.num_beams > 1 or drafter is not None:
        yield from _one_by_one(model, rows, chosen, bad_words, prefix, drafter)
    else:
        yield from _together(model, rows, longest, chosen, size, bad_words, prefix)


def _one_by_one(
    model: Model,
    rows: Sequence[list[int]],
    chosen: GenerationOptions,
    bad_words: Sequence[str],
    prefix: Prefix | None,
    drafter: Drafter | None,
) -> Generator[tuple[int, Completion], None, None]:
    from neo_runtime.text.prompts import named_prompt

    for place, ids in enumerate(rows):
        with named_prompt(place, len(rows)):
            found = model.generate(
                [ids], chosen, bad_words=bad_words, prefix=prefix, drafter=drafter
            )
        for completion in found:
            yield place, completion


def _together(
    model: Model,
    rows: Sequence[list[int]],
    longest: int,
    chosen: GenerationOptions,
    size: int | None,
    bad_words: Sequence[str],
    prefix: Prefix | None,
) -> Generator[tuple[int, Completion], None, None]:
    """Run the prompts in a scheduler; `longest`: most tokens of a prompt and its completion."""
    from neo_runtime.generation.fitting import fitting_batch
    from neo_runtime.scheduling.scheduler import Scheduler
    from neo_runtime.text.prompts import named_prompt

    copies, one = chosen.num_return_sequences, chosen.merged(num_return_sequences=1)
    sequences = len(rows) * copies
    if size is None:
        batch = fitting_batch(model, min(sequences, model.default_batch), longest)
    else:
        batch = min(sequences, size * copies)

    def result(place: int, pending: PendingCompletion) -> Completion:
        with named_prompt(place, len(rows)):
            return pending.result()

    # A few wait for those who leave, so that no place is empty; more would only take memory.
    room = Semaphore(batch + batch // 4 + 1)
    waiting: deque[tuple[int, PendingCompletion]] = deque()
    with Scheduler(model, max_batch_size=batch, max_length=longest) as scheduler:
        for place, ids in enumerate(rows):
            for copy in range(copies):
                room.acquire()
                pending = scheduler.submit(
                    ids, one, bad_words=bad_words, prefix=prefix, sequence_index=copy
                )
                pending.add_done_callback(lambda _: room.release())
                waiting.append((place, pending))
                while waiting and waiting[0][1].done():
                    done, first = waiting.popleft()
                    yield done, result(done, first)
        for place, pending in waiting:
            yield place, result(place, pending)
