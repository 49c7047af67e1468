"""Limits on sizes and numbers of requests."""

from __future__ import annotations

from dataclasses import dataclass

from neo_runtime.options.values import count, number

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server."""

    max_batch_size: int | None = None
    """Most sequences computed together; None: as suits the machine."""
    max_length: int | None = None
    """Most tokens of a prompt and its continuation together; None: the model's positions."""
    max_queue: int = 256
    """Most sequences being computed or waiting; requests beyond it are refused with status 503."""
    max_sequences: int | None = None
    """Most sequences of one request; None: half of `max_queue`, so that no request fills it."""
    request_seconds: float | None = None
    """Most seconds from the arrival of a request to the end of its answer; None: no limit."""
    prefix_cache_bytes: int = 0
    """Bytes of the prefix cache, with which requests reuse the beginnings of earlier prompts; 0:
    none."""
    max_body_bytes: int = 4 * 2**20
    """Most bytes of a request's body."""

    def __post_init__(self) -> None:
        """Validate the values."""
        for name in ("max_batch_size", "max_length", "max_sequences"):
            count(1, optional=True)(name, getattr(self, name))
        number(above=0, optional=True)("request_seconds", self.request_seconds)
        count(0)("prefix_cache_bytes", self.prefix_cache_bytes)
        for name in ("max_queue", "max_body_bytes"):
            count(1)(name, getattr(self, name))

    @property
    def most_sequences(self) -> int:
        """Most sequences of one request."""
        return min(self.max_queue, self.max_sequences or max(1, self.max_queue // 2))
