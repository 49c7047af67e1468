"""Log probabilities of given tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.sampling.choice import with_logprobs
from neo_runtime.sampling.scores import usable_maximum

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neo_runtime.cached_model import CachedModel
    from neo_runtime.sampling.choice import Choice

__all__ = ["scored_tokens"]


def scored_tokens(model: CachedModel, ids: NDArray[np.int64], most: int) -> list[Choice]:
    """See `Model.token_logprobs`.

    Args:
        model: computes the logits.
        ids: int64 [n], validated.
        most: `top_logprobs`.
    """
    read, targets = ids[:-1], ids[1:]
    found: list[Choice] = []
    if len(read) == 0:
        return found
    with model.new_cache(1, model.rounded_length(len(read))) as cache:
        for start in range(0, len(read), model.prefill_chunk):
            part = slice(start, start + model.prefill_chunk)
            logits = model.logits(read[part], cache)
            for row, token in zip(logits, targets[part].tolist(), strict=True):
                usable_maximum(row)
                found.append(with_logprobs(token, row, most))
    return found
