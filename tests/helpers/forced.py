"""Checks of tokens that a grammar forces, on any backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from helpers.hf_reference import varied_prompts
from neo_runtime import Scheduler
from neo_runtime.sampling.grammar_rule import GrammarRule

if TYPE_CHECKING:
    from neo_runtime import Model
    from neo_runtime.generation.completion import Completion
    from neo_runtime.options.grammar import Grammar

_SENTENCE = r"The little dog barked at the [a-z]{3,9} and the [a-z]{3,9} (of|in) [a-z ]{3,9}\. "
FORM = f"({_SENTENCE}){{3}}The end\\."


def assert_forced_tokens_fit(model: Model, tolerance: float) -> None:
    """Each token of a greedy text is the best one that the grammar allows, by a full scoring pass.

    Args:
        model: of the demo checkpoint.
        tolerance: of logits; a token closer than that to the best one may be chosen.
    """
    grammar = model.grammar(regex=FORM)
    options: dict[str, Any] = {"grammar": grammar, "max_new_tokens": 70}
    prompts = varied_prompts(4)
    found = [model.generate(prompt, **options) for prompt in prompts]
    found += model.generate(prompts, **options)
    with Scheduler(model, max_batch_size=3, max_length=256) as scheduler:
        pending = [scheduler.submit(prompt, **options) for prompt in prompts]
        found += [one.result(timeout=300) for one in pending]
    for one in found:
        assert one.timings.forced_tokens > 20
        _assert_best(model, grammar, one, tolerance)


def _assert_best(model: Model, grammar: Grammar, found: Completion, tolerance: float) -> None:
    ids = np.array([*found.prompt_token_ids, *found.token_ids])
    start = len(found.prompt_token_ids)
    rule = GrammarRule(grammar, model.manifest.model.eos_token_id, start)
    logits = model.logits(ids)
    for place in range(start, len(ids)):
        scores = rule(ids[:place], logits[place - 1].copy())
        assert scores[ids[place]] >= scores.max() - tolerance
