"""Chunked prefill: a long prompt is computed in chunks, between the steps of a running batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo_runtime.closable import Closable, closed_on_error

if TYPE_CHECKING:
    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.cached_model import CachedModel
    from neo_runtime.scheduling.request import Request

__all__ = ["ChunkedPrefill"]


class ChunkedPrefill(Closable):
    """The prefill of one request in a KV cache of its own."""

    def __init__(self, model: CachedModel, request: Request, chunk: int) -> None:
        """Allocate the cache; nothing is computed yet.

        Args:
            model: computes the prompt.
            request: the request whose prompt is computed.
            chunk: most tokens per call of the model.

        Raises:
            CacheLimitError: there is no room for another cache.
        """
        self.request = request
        self._model, self._chunk = model, chunk
        self._unread = request.unread_prompt
        self.cache = model.new_cache(1, model.rounded_length(request.prompt_length))
        with closed_on_error(self.cache):
            request.fill(self.cache, 0)

    def compute_chunk(self) -> StepLogits | None:
        """Compute at most `Model.prefill_chunk` tokens.

        Returns:
            The logits after the prompt's last token, [1, vocab]; None while tokens are left.
        """
        logits = None
        for _ in range(0, self._model.prefill_chunk, self._chunk):
            if not len(self._unread):
                break
            logits = self._model.prefill_step(self.cache, [self._unread[: self._chunk]])
            self._unread = self._unread[self._chunk :]
            self.request.keep(self.cache, 0)
        return None if len(self._unread) else logits

    def close(self) -> None:
        """Free the cache."""
        self.cache.close()
