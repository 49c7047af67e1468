"""Held-out perplexity of the demo model: the score graph's equals PyTorch's."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.models import DEMO, Reference
from helpers.running import Graphs
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

RELATIVE = 1e-4
PUBLISHED = json.loads((DEMO / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pieces() -> NDArray[np.int64]:
    """[pieces, length]: the first pieces of the held-out stories, each story followed by id 0."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    count, length = PUBLISHED["pieces"], PUBLISHED["length"]
    ids: list[int] = []
    with (DEMO / "heldout.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            ids += [*tokenizer.encode(json.loads(line)["text"]).ids, 0]
            if len(ids) >= count * length:
                break
    return np.array(ids[: count * length]).reshape(count, length)


def perplexity(
    score: Callable[[NDArray[np.int64]], NDArray[np.float32]], pieces: NDArray[np.int64]
) -> float:
    """exp of the mean negative log-likelihood of every token but each piece's first."""
    total, count = 0.0, 0
    for piece in pieces:
        logits = score(piece[None])[0, :-1].astype(np.float64)
        top = logits.max(axis=-1)
        normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        total += float((normalizer - logits[np.arange(len(logits)), piece[1:]]).sum())
        count += len(logits)
    return math.exp(total / count)


@pytest.mark.parametrize("bundle", ["mini_bundle", "portable_bundle"])
def test_as_published(
    bundle: str, pieces: NDArray[np.int64], request: pytest.FixtureRequest
) -> None:
    """The figure that came with the model, from PyTorch, over all pieces."""
    graphs = Graphs(request.getfixturevalue(bundle))
    found = perplexity(lambda ids: graphs.run("score", ids), pieces)
    assert found == pytest.approx(PUBLISHED["perplexity"], rel=RELATIVE)


@pytest.mark.parametrize("bundle", ["mini_bundle", "portable_bundle"])
def test_as_pytorch_here(
    bundle: str,
    pieces: NDArray[np.int64],
    reference: Reference,
    request: pytest.FixtureRequest,
) -> None:
    """The same pieces, a few of them, by the PyTorch of this environment."""
    graphs = Graphs(request.getfixturevalue(bundle))
    some = pieces[:4]
    found = perplexity(lambda ids: graphs.run("score", ids), some)
    assert found == pytest.approx(perplexity(reference.logits, some), rel=RELATIVE)
