"""What is counted for Prometheus, in a registry of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from neo_runtime.generation.completion import Completion

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _Total(Collector):
    """A counter that somebody else counts."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[CounterMetricFamily]:
        """See the base class."""
        yield CounterMetricFamily(self._name, self._text, value=self._value())


class Metrics:
    """Counters of one application."""

    def __init__(self) -> None:
        """All zero."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "neo_requests",
            "Requests for completions, by HTTP status",
            ["status"],
            registry=registry,
        )
        self._prompt = Counter("neo_prompt_tokens", "Tokens of prompts", registry=registry)
        self._generated = Counter("neo_generated_tokens", "Tokens generated", registry=registry)
        self._ended = Counter(
            "neo_sequences",
            "Sequences that ended, by finish reason",
            ["finish_reason"],
            registry=registry,
        )
        self._first = Histogram(
            "neo_time_to_first_token_seconds",
            "From a request's arrival in the queue to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "neo_time_per_token_seconds",
            "Seconds between two tokens of a sequence, on average over the sequence",
            buckets=_PER_TOKEN,
            registry=registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Report what a function says when asked."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def watch_total(self, name: str, text: str, value: Callable[[], float]) -> None:
        """The same of what only grows."""
        self._registry.register(_Total(name, text, value))

    def begun(self, prompt_tokens: int) -> None:
        """A prompt was taken."""
        self._prompt.inc(prompt_tokens)

    def cancelled(self) -> None:
        """A sequence that nobody waits for any more."""
        self._ended.labels("cancelled").inc()

    def ended(self, completion: Completion) -> None:
        """A sequence has come to its end."""
        tokens, timings = len(completion.token_ids), completion.timings
        self._generated.inc(tokens)
        self._ended.labels(completion.finish_reason).inc()
        if tokens:
            self._first.observe(timings.time_to_first_token)
        if tokens > 1:
            self._between.observe(timings.decode_seconds / (tokens - 1))

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
