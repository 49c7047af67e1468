"""Measures verification of draft tokens, and generation with and without drafts, in rounds."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from neo_tools.worker.engine import context_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Drafter
    from neo_runtime.model import Model
    from neo_runtime.text.prompts import Prompt

__all__ = ["WITHOUT", "Texts", "checking_seconds", "texts"]

WITHOUT = "without"
"""Name of generation without drafts."""


def checking_seconds(
    model: Model, depth: int, counts: Sequence[int], repetitions: int
) -> dict[int, list[float]]:
    """Measure the verification of several tokens at once, and a decode step of one token.

    Args:
        model: the model.
        depth: tokens in the cache before the verified ones, at least 2.
        counts: numbers of tokens to verify at once.
        repetitions: measured rounds, after one round of warm-up.

    Returns:
        Seconds of each round, by number of tokens; 1 is the decode step.
    """
    vocab_size = model.manifest.model.vocab_size
    ids = np.array(context_ids(depth + max(counts), 1, 1, vocab_size)[0])
    found: dict[int, list[float]] = {count: [] for count in (1, *counts)}
    for _ in range(repetitions + 1):
        for count, seconds in found.items():
            with model.new_cache(1, depth + count) as cache:
                model.prefill(cache, [ids[: depth - 1]])
                model.decode(cache, ids[depth - 1 : depth])  # warm-up: binds the buffers of decode
                started = perf_counter()
                if count == 1:
                    model.decode(cache, ids[depth : depth + 1])
                else:
                    model.logits(ids[depth : depth + count], cache)
                seconds.append(perf_counter() - started)
    return {count: seconds[1:] for count, seconds in found.items()}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Measurements of all prompts with one drafter, or without."""

    prompts: int
    seconds: list[float]
    """Decode seconds of each round: the time after the first token of each text."""
    tokens: int
    """New tokens of all texts of a round, first tokens included."""
    drafted: int
    accepted: int
    differing: int
    """Number of texts that differ from those without drafts."""


def texts(
    model: Model,
    prompts: Sequence[Prompt],
    new_tokens: int,
    drafters: Mapping[str, Drafter],
    repetitions: int,
    progress: Callable[[str], None],
) -> dict[str, Texts]:
    """Continue all prompts greedily, with each drafter and without; they take turns at each prompt.

    Args:
        model: the model.
        prompts: texts or token ids.
        new_tokens: new tokens for each prompt, at least 2.
        drafters: the drafters, by name; `WITHOUT` is added.
        repetitions: measured rounds, after a warm-up with one prompt.
        progress: called with a line before each round.

    Returns:
        Measurements by name of the drafter.
    """
    ways: dict[str, Drafter | None] = {WITHOUT: None, **drafters}
    for drafter in ways.values():
        model.generate(prompts[0], max_new_tokens=4, drafter=drafter)
    rounds: dict[str, list[list[Completion]]] = {way: [] for way in ways}
    for turn in range(repetitions):
        progress(f"round {turn + 1}/{repetitions}: {len(prompts)} prompts")
        for found in rounds.values():
            found.append([])
        for index, prompt in enumerate(prompts):
            first = (turn + index) % len(ways)
            for way in [*ways, *ways][first : first + len(ways)]:
                one = model.generate(
                    prompt, max_new_tokens=new_tokens, ignore_eos=True, drafter=ways[way]
                )
                rounds[way][turn].append(one)
    return {way: _summary(found, rounds[WITHOUT][0]) for way, found in rounds.items()}


def _summary(rounds: Sequence[Sequence[Completion]], without: Sequence[Completion]) -> Texts:
    first = rounds[0]
    return Texts(
        prompts=len(first),
        seconds=[sum(one.timings.decode_seconds for one in each) for each in rounds],
        tokens=sum(len(one.token_ids) for one in first),
        drafted=sum(one.timings.draft_tokens for one in first),
        accepted=sum(one.timings.accepted_draft_tokens for one in first),
        differing=sum(
            one.token_ids != other.token_ids for one, other in zip(first, without, strict=True)
        ),
    )
