"""Metrics for Prometheus, in a registry of their own."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from neo_runtime.scheduling.pending import PendingCompletion

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _Total(Collector):
    """A counter whose value is kept elsewhere and read when the metrics are collected."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[CounterMetricFamily]:
        """See the base class."""
        yield CounterMetricFamily(self._name, self._text, value=self._value())


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        """Create the metrics, all zero."""
        self._registry = registry = CollectorRegistry()
        with suppress(ValueError):  # process_* metrics exist on Linux only
            ProcessCollector(registry=registry)
        self._requests = Counter(
            "neo_requests",
            "Completed requests for completions, by HTTP status; 499: the client had disconnected",
            ["status"],
            registry=registry,
        )
        self._whole = Histogram(
            "neo_request_seconds",
            "Seconds from the arrival of a request for completions to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt = Counter("neo_prompt_tokens", "Prompt tokens", registry=registry)
        self._ended = Counter(
            "neo_sequences",
            'Completed sequences, by finish reason, "cancelled" or "error"',
            ["finish_reason"],
            registry=registry,
        )
        self._queued = Histogram(
            "neo_queue_seconds",
            "Seconds from a sequence's arrival in the queue to the start of its prompt",
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "neo_time_to_first_token_seconds",
            "Seconds from a sequence's arrival in the queue to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "neo_time_per_token_seconds",
            "Seconds between two tokens, averaged over each sequence",
            buckets=_PER_TOKEN,
            registry=registry,
        )

    def tell(self, name: str, text: str, **facts: str) -> None:
        """Add a gauge that is always 1, whose labels are constant facts."""
        Gauge(name, text, list(facts), registry=self._registry).labels(**facts).set(1)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value a function returns when the metrics are collected."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def watch_total(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a counter whose value a function returns when the metrics are collected."""
        self._registry.register(_Total(name, text, value))

    def begun(self, prompt_tokens: int) -> None:
        """Count the tokens of a prompt that was accepted."""
        self._prompt.inc(prompt_tokens)

    def answered(self, status: int, seconds: float) -> None:
        """Count a completed request for completions.

        Args:
            status: HTTP status of the answer.
            seconds: from its arrival to the end of its answer.
        """
        self._requests.labels(status).inc()
        self._whole.observe(seconds)

    def left(self, pending: PendingCompletion) -> None:
        """Count a sequence that has finished, failed or been cancelled."""
        if pending.queue_seconds is not None:
            self._queued.observe(pending.queue_seconds)
        if pending.time_to_first_token is not None:
            self._first.observe(pending.time_to_first_token)
        if pending.cancelled():
            self._ended.labels("cancelled").inc()
        elif pending.exception() is not None:
            self._ended.labels("error").inc()
        else:
            completion = pending.result()
            self._ended.labels(completion.finish_reason).inc()
            after_first = len(completion.token_ids) - 1
            if after_first > 0:
                self._between.observe(completion.timings.decode_seconds / after_first)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
