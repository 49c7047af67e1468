"""The random generator of each sequence, from the option `seed`."""

from __future__ import annotations

import numpy as np

from neo_runtime.errors import RequestError

__all__ = ["check_seeds", "row_generator"]


def check_seeds(seed: int | tuple[int, ...] | None, prompts: int) -> None:
    """Check that a sequence of seeds has one entry for each prompt.

    Raises:
        RequestError: the numbers differ.
    """
    if isinstance(seed, tuple) and len(seed) != prompts:
        raise RequestError(
            f"seed has {len(seed)} entries for {prompts} prompt{'s' if prompts > 1 else ''}; give "
            "one seed for each prompt, or a single integer"
        )


def row_generator(
    seed: int | tuple[int, ...] | None, prompt_index: int, sequence_index: int
) -> np.random.Generator:
    """The random generator of one sequence.

    One integer serves every prompt, so that a prompt in a batch gets the draws that it gets
    alone; the continuations of one prompt differ by `sequence_index`.

    Args:
        seed: the option `seed`; a sequence has one seed per prompt, None is fresh entropy.
        prompt_index: index of the prompt in the request.
        sequence_index: index of the sequence among the prompt's `num_return_sequences`.
    """
    if isinstance(seed, tuple):
        seed = seed[prompt_index]
    spawn_key = () if seed is None else (sequence_index,)
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=spawn_key))
    )
