"""Log probabilities of prompts, one prompt at a time."""

from __future__ import annotations

from time import monotonic, sleep
from typing import TYPE_CHECKING

from neo_runtime.closable import Closable
from neo_runtime.errors import CacheLimitError

from neo_server.one_thread import OneThread

if TYPE_CHECKING:
    import numpy as np
    from neo_runtime.model import Model
    from neo_runtime.sampling.choice import Choice
    from numpy.typing import NDArray

__all__ = ["PromptScorer"]

_PATIENCE = 30.0
"""Seconds that a prompt waits for room."""


class PromptScorer(Closable):
    """A thread that scores prompts beside the scheduler, in the order in which they come."""

    def __init__(self, model: Model) -> None:
        """Start nothing yet."""
        self._model = model
        self._thread = OneThread("neo-scores")

    async def scores(self, ids: NDArray[np.int64], top_logprobs: int) -> list[Choice]:
        """See `Model.token_logprobs`.

        Raises:
            CacheLimitError: there was no room for longer than half a minute.
            ApiError: the server ends.
        """
        return await self._thread.run(self._score, ids, top_logprobs)

    def _score(self, ids: NDArray[np.int64], top_logprobs: int) -> list[Choice]:
        end = monotonic() + _PATIENCE
        while True:
            try:
                return self._model.token_logprobs(ids, top_logprobs=top_logprobs)
            except CacheLimitError:  # a long prompt that is being read may have it
                if monotonic() > end:
                    raise
                sleep(0.05)

    def close(self) -> None:
        """Finish the prompt that is being scored; who waits gets an error."""
        self._thread.close()
