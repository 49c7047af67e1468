"""Rounds of checked guesses, and of texts with and without them."""

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


def checking_seconds(
    model: Model, depth: int, counts: Sequence[int], repetitions: int
) -> dict[int, list[float]]:
    """Seconds of scoring some tokens behind a text, in rounds; of 1: a step of decode.

    Args:
        model: loaded.
        depth: tokens of the text, at least 2.
        counts: how many tokens are scored.
        repetitions: rounds, after one that does not count.
    """
    vocab_size = model.manifest.model.vocab_size
    ids = np.array(context_ids(depth + max(counts), 1, 1, vocab_size)[0])
    found: dict[int, list[float]] = {count: [] for count in (1, *counts)}
    for _ in range(repetitions + 1):
        for count, seconds in found.items():
            with model.new_cache(1, depth + count) as cache:
                model.prefill(cache, [ids[: depth - 1]])
                model.decode(cache, ids[depth - 1 : depth])  # binds the step
                started = perf_counter()
                if count == 1:
                    model.decode(cache, ids[depth : depth + 1])
                else:
                    model.logits(ids[depth : depth + count], cache)
                seconds.append(perf_counter() - started)
    return {count: seconds[1:] for count, seconds in found.items()}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """All prompts in one way, round by round."""

    prompts: int
    seconds: list[float]
    """Behind the first token of each text."""
    tokens: int
    """Of all texts of a round."""
    drafted: int
    accepted: int
    differing: int
    """Texts that are not the same as without guesses."""


def texts(
    model: Model,
    prompts: Sequence[Prompt],
    new_tokens: int,
    drafters: Mapping[str, Drafter],
    repetitions: int,
    progress: Callable[[str], None],
) -> dict[str, Texts]:
    """Continue every prompt in every way, greedily; ways take turns, prompt by prompt.

    Args:
        model: loaded.
        prompts: text or token ids.
        new_tokens: of each, at least 2.
        drafters: by name; `WITHOUT` comes by itself.
        repetitions: rounds, after one prompt in each way that does not count.
        progress: told what happens next.
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
