"""The runtime's own loop over graphs that also output their probed values.

Prefill and decode use `neo_runtime`'s cache stores, so the checks see the actual cache, in the
bundle's own layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from neo_export.comparison.cache_steps import read_cache_steps
from neo_export.comparison.probed import open_probed, probed_values, score_trace
from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend
from neo_runtime.backends.cpu.sessions import SessionFactory

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from neo_export.comparison.trace import Trace
    from neo_export.quantize.kv_cache import CacheSteps
    from neo_runtime.backends.base import CacheStore
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.manifest import Manifest
    from numpy.typing import NDArray

    Sink = Callable[[dict[str, NDArray[Any]]], None]

__all__ = ["Probed", "ProbedBackend"]


class Probed(Protocol):
    """A backend whose graphs show their places."""

    manifest: Manifest
    cache_steps: CacheSteps | None
    """The steps of an int8 cache."""
    sink: Sink
    """Receives the values of every call, [1, S, width] each."""
    scored_at_once: int
    """See `Backend.scored_at_once`."""

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""

    def score_trace(self, ids: NDArray[np.int64]) -> Trace:
        """Places and logits of every position, from the score graph."""

    def close(self) -> None:
        """See `Backend.close`."""


class ProbedBackend(OnnxRuntimeBackend):
    """Sessions of probed graphs; after every call `sink` gets the values, [1, S, width] each."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        super().__init__(SessionFactory(bundle, threads=threads, keep_prepacked=False))
        self._bundle_folder = bundle.path
        self._threads = threads
        self.cache_steps = read_cache_steps(bundle.path, bundle.manifest)
        """The steps of an int8 cache."""
        self._probed: dict[str, _ProbedSession] = {}
        self._scoring: Any = None
        self.sink: Sink = lambda values: None

    def session(self, graph: str) -> Any:
        """The probed session of "prefill" or "decode"; one at a time is kept."""
        if graph not in self._probed:
            session = open_probed(self._bundle_folder, self.manifest, graph, threads=self._threads)
            names = probed_values(self.manifest)
            self._probed[graph] = _ProbedSession(session, names, lambda v: self.sink(v))
        return self._probed[graph]

    def score_trace(self, ids: NDArray[np.int64]) -> Trace:
        """See `Probed.score_trace`."""
        if self._scoring is None:
            self._scoring = open_probed(
                self._bundle_folder, self.manifest, "score", threads=self._threads
            )
        return score_trace(self._scoring, self.manifest, ids)

    def close(self) -> None:
        """See `Backend.close`."""
        self._probed.clear()
        self._scoring = None
        super().close()


class _ProbedSession:
    """The part of `InferenceSession` that the runtime's IO binding calls use."""

    def __init__(self, session: Any, names: list[str], sink: Sink) -> None:
        self._session = session
        self._names = names
        self._sink = sink

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        # Bound after the store's outputs, and at each call, because their shapes differ.
        for name in self._names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[-len(self._names) :]
        self._sink({n: o.numpy() for n, o in zip(self._names, outputs, strict=True)})
