"""How much a server takes at once."""

from __future__ import annotations

from dataclasses import dataclass

from neo_runtime.options.values import count, number

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken at once."""

    max_batch_size: int | None = None
    """Sequences that are computed together; None: what suits the machine."""
    max_length: int | None = None
    """Tokens of a prompt and its continuation; None: the model's positions."""
    max_queue: int = 256
    """Sequences that are in the house, computed or waiting; more are refused with status 503."""
    max_sequences: int | None = None
    """Continuations of one request; None: half of `max_queue`, so that no request fills it."""
    request_seconds: float | None = None
    """From a request's arrival to the end of its answer; None: as long as it takes."""
    prefix_cache_bytes: int = 0
    """Memory for what requests began with, so that others compute only the rest."""
    max_body_bytes: int = 4 * 2**20
    """Of a request."""

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        for name in ("max_batch_size", "max_length", "max_sequences"):
            count(1, optional=True)(name, getattr(self, name))
        number(above=0, optional=True)("request_seconds", self.request_seconds)
        count(0)("prefix_cache_bytes", self.prefix_cache_bytes)
        for name in ("max_queue", "max_body_bytes"):
            count(1)(name, getattr(self, name))

    @property
    def most_sequences(self) -> int:
        """That one request may ask for."""
        return min(self.max_queue, self.max_sequences or max(1, self.max_queue // 2))
