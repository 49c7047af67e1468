"""Many prompts in one batch that they join and leave; what is done is out of the house at once."""

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
    """Complete prompts in their order, each as `Model.generate` does with all of them.

    Args:
        model: the model.
        prompts: text or token ids.
        chosen: the options, without a seed for each prompt.
        size: prompts computed together; None for what suits the machine. With beams or a drafter
            it is one after the other.
        bad_words: as for `Model.generate`.
        prefix: as for `Model.generate`.
        drafter: as for `Model.generate`.

    Yields:
        The place of a prompt and a completion of it, once those before it are done.

    Raises:
        RequestError: a prompt or an option that cannot be honoured: before any is computed.
        NeoError: see `Model.generate`.
    """
    # Only now what imports numpy: --help does without.
    from neo_runtime.generation.fitting import fitting_batch
    from neo_runtime.scheduling.scheduler import Scheduler
    from neo_runtime.text.prompts import named_prompt, of_each, prompt_ids

    known = 0 if prefix is None else len(prefix.ids)
    longest = 0

    def checked(prompt: Prompt) -> list[int]:
        nonlocal longest
        ids = prompt_ids(prompt, model.manifest.model.vocab_size, model.tokenizer)
        total = chosen.total_length(known + len(ids), model.manifest.max_length)
        longest = max(longest, total)
        found: list[int] = ids.tolist()
        return found

    rows = of_each(prompts, checked)
    if chosen.num_beams > 1 or drafter is not None:
        for place, ids in enumerate(rows):
            with named_prompt(place, len(rows)):
                found = model.generate(
                    [ids], chosen, bad_words=bad_words, prefix=prefix, drafter=drafter
                )
            for completion in found:
                yield place, completion
        return
    copies, one = chosen.num_return_sequences, chosen.merged(num_return_sequences=1)
    sequences = len(rows) * copies
    if size is None:
        batch = fitting_batch(model, min(sequences, model.default_batch), longest)
    else:
        batch = min(sequences, size * copies)
    with Scheduler(model, max_batch_size=batch, max_length=longest) as scheduler:

        def submit(ids: list[int], copy: int) -> PendingCompletion:
            return scheduler.submit(
                ids, one, bad_words=bad_words, prefix=prefix, sequence_index=copy
            )

        def result(place: int, pending: PendingCompletion) -> Completion:
            with named_prompt(place, len(rows)):
                return pending.result()

        work = ((place, ids, copy) for place, ids in enumerate(rows) for copy in range(copies))
        # A few wait for those who leave, so that no place is empty; more would only take memory.
        room = Semaphore(batch + batch // 4 + 1)
        pending: deque[tuple[int, PendingCompletion]] = deque()
        for place, ids, copy in work:
            room.acquire()
            pending.append((place, submit(ids, copy)))
            pending[-1][1].add_done_callback(lambda _: room.release())
            while pending and pending[0][1].done():
                done, first = pending.popleft()
                yield done, result(done, first)
        for place, last in pending:
            yield place, result(place, last)
