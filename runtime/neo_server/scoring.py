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
"""Most seconds that a prompt waits for room in the KV caches."""


class PromptScorer(Closable):
    """Scores prompts in a thread of its own, beside the scheduler, in order of arrival."""

    def __init__(self, model: Model) -> None:
        """Begin with no prompts; the thread starts with the first."""
        self._model = model
        self._thread = OneThread("neo-scores")

    async def scores(self, ids: NDArray[np.int64], top_logprobs: int) -> list[Choice]:
        """`Model.token_logprobs` of one prompt.

        Args:
            ids: the prompt's token ids, [length].
            top_logprobs: how many of the most probable tokens to add at each position.

        Raises:
            CacheLimitError: there was no room in the KV caches for half a minute.
            ApiError: (503) the server is shutting down.
        """
        return await self._thread.run(self._score, ids, top_logprobs)

    def _score(self, ids: NDArray[np.int64], top_logprobs: int) -> list[Choice]:
        end = monotonic() + _PATIENCE
        while True:
            try:
                return self._model.token_logprobs(ids, top_logprobs=top_logprobs)
            except CacheLimitError:  # a long prompt that is being prefilled may hold the room
                if monotonic() > end:
                    raise
                sleep(0.05)

    def close(self) -> None:
        """Finish the prompt that is being scored; callers that wait for others get an error."""
        self._thread.close()
