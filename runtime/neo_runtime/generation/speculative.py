"""Speculative decoding: several draft tokens are verified in one call of the model.

    text    Once upon a time there was
    guess                              a little girl who
    scored  the model's logits after "was", "a", "little", "girl", "who": one call
    chosen                             a little boy               "girl" was wrong: crop the cache

Each token is chosen as without a drafter, by the same rules and random draws from the logits after
the text before it. A draft token that equals the chosen token only means that the next logits are
already computed. So the text is the same as without drafts, up to rounding: several positions are
computed by another graph than one, and where activations are rounded to 8 bits, a difference in the
last digit can change the choice at a near tie.

The method is that of arXiv 2211.17192. There, a draft token proposed with certainty is accepted
with the probability that the model gives it; drawing a token and comparing does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.step_logits import StepLogits
from neo_runtime.errors import RequestError
from neo_runtime.generation.drafting import Drafter
from neo_runtime.generation.feeding import feed
from neo_runtime.generation.generator import read_prompts, steps
from neo_runtime.generation.one_by_one import one_by_one
from neo_runtime.generation.rows import make_rows
from neo_runtime.text.shared import shared_length

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.generation.completion import Completion
    from neo_runtime.generation.drafting import Propose
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.generation.rows import Row
    from neo_runtime.generation.text_stream import Piece
    from neo_runtime.options.generation_options import GenerationOptions

__all__ = ["check_drafter", "drafted_completions", "drafted_steps"]

_FIRST = 2
"""Most tokens of the first draft. After a draft that was accepted whole, the limit doubles; after
any other, it is the number of accepted tokens plus one. So drafts stay short where they fail, and
grow where text is copied."""


def drafted_steps(
    model: CachedModel,
    cache: KVCache,
    row: Row,
    drafter: Drafter,
    should_stop: Callable[[], bool],
) -> Generator[list[Piece], None, None]:
    """`generator.steps` for one row with a drafter: yields a list of one piece per step.

    Args:
        model: computes the logits.
        cache: an empty cache for one row.
        row: the continuation.
        drafter: proposes draft tokens.
        should_stop: called after each token; once it returns true, the row ends as "cancelled".
    """
    if row.total == len(row.prompt) + 1:
        yield from steps(model, cache, [[row]], should_stop)  # nothing to guess
        return
    model.prepare(scores=True)  # before the clock starts
    with drafter.begin(model, row.total) as propose:
        logits = list(read_prompts(model, cache, [[row]]))
        guess: list[int] = []
        limit, right = _FIRST, 0
        while True:
            piece = row.advance(logits[right])
            same = shared_length(row.unfed, guess[right:])
            row.next_tokens(same)  # already computed
            row.accepted += same
            right += same
            yield [piece]
            if row.finish_reason is not None:
                return
            if should_stop():
                yield [row.cancel()]
                return
            if not row.unfed:
                continue
            if guess:
                limit = max(limit, 2 * right) if right == len(guess) else right + 1
            cache.crop(len(row.sampler.ids) - len(row.unfed))
            guess = _guess(model, cache, row, propose, limit)
            row.drafted += len(guess)
            right, logits = 0, list(_scored(model, cache, row, guess))


def _scored(model: CachedModel, cache: KVCache, row: Row, guess: list[int]) -> StepLogits:
    """The logits after the last emitted token, then after each draft token, one row for each."""
    if not guess:
        return feed(model, cache, [row], len(row.unfed))
    said = row.next_tokens(len(row.unfed))
    return StepLogits.at_hand(model.logits([*said, *guess], cache)[len(said) - 1 :])


def _guess(model: CachedModel, cache: KVCache, row: Row, propose: Propose, limit: int) -> list[int]:
    """Draft tokens to verify after the last token; no more than can be cropped again."""
    ids = row.sampler.ids.view()
    ids.flags.writeable = False
    most = min(row.total - len(ids) - 1, cache.room_to_crop - len(row.unfed), limit)
    if most < 1:
        return []
    given, vocab_size = propose(ids, most), model.manifest.model.vocab_size
    try:
        found: NDArray[Any] = np.asarray(given)
    except ValueError:  # rows of unequal lengths
        found = np.empty((0, 0))
    is_row = found.ndim == 1 and (found.dtype.kind in "iu" or not found.size)
    if not is_row or (found.size and (found.min() < 0 or found.max() >= vocab_size)):
        raise RequestError(
            f"the drafter gave {given!r}, expected token ids in a row, 0 to {vocab_size - 1}"
        )
    guess: list[int] = found[:most].tolist()
    return guess


def drafted_completions(
    model: CachedModel,
    prompts: Sequence[NDArray[np.int64]],
    options: GenerationOptions,
    drafter: Drafter,
    should_stop: Callable[[], bool],
    prefix: Prefix | None,
) -> list[Completion]:
    """Continue prompts one by one. Arguments and errors are those of `sampled_completions`."""

    def complete(index: int, ids: NDArray[np.int64], total: int) -> list[Completion]:
        with model.new_cache(1, model.rounded_length(total - 1)) as cache:
            [row] = make_rows(model, ids, options, total, index, prefix)
            for _ in drafted_steps(model, cache, row, drafter, should_stop):
                pass
        return [row.completion()]

    return one_by_one(model, prompts, options, should_stop, complete)


def check_drafter(drafter: Drafter, options: GenerationOptions) -> None:
    """Refuse a value that is not a drafter, and options that do not work with one.

    Raises:
        RequestError: the message says what to change.
    """
    if not isinstance(drafter, Drafter):
        raise RequestError(
            f"drafter is {drafter!r}, expected an instance of neo_runtime.PromptLookup, DraftModel "
            "or another subclass of Drafter"
        )
    if options.num_beams > 1 or options.num_return_sequences > 1:
        raise RequestError(
            "a drafter guesses for one continuation; set num_beams=1 and num_return_sequences=1, "
            "or do without guesses"
        )
