"""The demo model's held-out stories, as token ids, and the perplexity over them."""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING

import numpy as np
from helpers.models import DEMO
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


CALIBRATION_STORIES = slice(0, 240)
"""For statistics and tuning: 49,826 tokens."""
TEST_STORIES = slice(240, 500)
"""For judging int4 with statistics. Nothing may be tuned on these."""


def story_lines(stories: slice) -> list[str]:
    """A slice of the held-out stories, as lines of JSON."""
    return (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[stories]


@functools.cache
def judged_pieces(length: int) -> NDArray[np.int64]:
    """[pieces, length] of `TEST_STORIES`, each story followed by id 0: 113 pieces of 512."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = []
    for line in story_lines(TEST_STORIES):
        ids += [*tokenizer.encode(json.loads(line)["text"]).ids, 0]
    whole = len(ids) // length * length
    found = np.array(ids[:whole]).reshape(-1, length)
    found.flags.writeable = False
    return found


@functools.cache
def held_out_ids(pieces: int, length: int) -> NDArray[np.int64]:
    """[pieces, length]: the first pieces of the stories, each story followed by id 0."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = []
    with (DEMO / "heldout.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            ids += [*tokenizer.encode(json.loads(line)["text"]).ids, 0]
            if len(ids) >= pieces * length:
                break
    found = np.array(ids[: pieces * length]).reshape(pieces, length)
    found.flags.writeable = False
    return found


def perplexity(
    score: Callable[[NDArray[np.int64]], NDArray[np.float32]], pieces: NDArray[np.int64]
) -> float:
    """Perplexity: exp of the mean negative log-likelihood of all tokens but each piece's first.

    Args:
        score: token ids [S] → logits [S, V].
        pieces: token ids [pieces, S].
    """
    total, count = 0.0, 0
    for piece in pieces:
        logits = score(piece)[:-1].astype(np.float64)
        top = logits.max(axis=-1)
        normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        total += float((normalizer - logits[np.arange(len(logits)), piece[1:]]).sum())
        count += len(logits)
    return math.exp(total / count)
