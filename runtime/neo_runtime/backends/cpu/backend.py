"""The CPU backend: onnxruntime sessions over the bundle's graphs."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.base import Backend, CacheStore, layer_lengths, position_bytes
from neo_runtime.backends.cpu.append import AppendStore
from neo_runtime.backends.cpu.blocks import HostBlocks
from neo_runtime.backends.cpu.cache_memory import KeptBlock
from neo_runtime.backends.cpu.heap import Heap, give_back, hold_within_calls
from neo_runtime.backends.cpu.in_place import InPlaceStore
from neo_runtime.backends.cpu.sessions import SessionFactory, keep_sessions_for_ever
from neo_runtime.backends.cpu.unused_memory import forget_pages
from neo_runtime.bundle.manifest import WEIGHTS_NAME, is_quantized
from neo_runtime.errors import NeoError
from neo_runtime.forks import in_every_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from neo_runtime.backends.base import BlockPool

__all__ = ["OnnxRuntimeBackend"]

_SPARE_SHARE, _LARGEST_SPARE = 40, 32 << 20
"""Freed heap kept for the next prompt: this fraction (1/40) of the weights' size, at most 32 MiB.
At the 1.3B shape that is 32 MB in int8, where a prompt of 128 tokens needs 25 MB, and 18 MB in
int4, enough for 100 tokens."""
_TOKENS_MAPPED = 16
"""Tokens that decode reads before the pages of their embedding rows are released: Linux maps up to
300 kB around each row."""


_live: weakref.WeakSet[OnnxRuntimeBackend] = weakref.WeakSet()


class OnnxRuntimeBackend(Backend):
    """One session per graph, made on first use and shared by all threads.

    A forked child makes its own sessions, because it does not inherit the threads of its parent's.
    """

    described = "CPU"

    def __init__(self, factory: SessionFactory) -> None:
        """Prepare without loading a graph.

        Args:
            factory: makes the sessions; must not be shared with another backend.
        """
        self._factory = factory
        self._closed = False
        self.manifest = factory.manifest
        if is_quantized(self.manifest.precision):
            # A few percent faster: activations stay in the processor's caches. Float32 weights
            # need longer chunks: reading them all once per chunk costs more than it does here.
            self.default_chunk = 256
        hold_within_calls()
        self._tokens_read = 0
        """Tokens decoded since their embedding rows were released; not exact across threads."""
        self.begin()
        _live.add(self)

    def begin(self) -> None:
        """Start without sessions; also in a forked child, where the parent's locks may be stuck."""
        self._sessions: dict[str, Any] = {}
        self._factory.token_rows.clear()
        self._lock = threading.Lock()
        self._heap = Heap(_spare(self.manifest.files[WEIGHTS_NAME].size))
        self.kept_block = KeptBlock()
        """The memory of the cache that was closed last."""

    def session(self, graph: str) -> Any:
        """The `onnxruntime.InferenceSession` of "prefill", "decode" or "score"; made if needed.

        Raises:
            NeoError: the model is closed, or see `SessionFactory.session`.
        """
        with self._lock:
            if self._closed:
                raise NeoError("the model is closed; call neo_runtime.load again")
            if graph not in self._sessions:
                self._sessions[graph] = self._factory.session(graph)
                give_back()
            return self._sessions[graph]

    def prepare(self, graphs: Sequence[str] = ("prefill", "decode")) -> None:
        """See `Backend.prepare`."""
        for graph in graphs:
            self.session(graph)

    @property
    def prepacked_bytes(self) -> int:
        """See `Backend.prepacked_bytes`."""
        store = self._factory.prepacked
        return store.bytes_on_disk if store is not None else 0

    def translated(self) -> AbstractContextManager[None]:
        """A context manager for running a session; see `failures.translated`."""
        return self._factory.translated()

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`."""
        layer = position_bytes(self.manifest) // self.manifest.model.num_layers
        once = layer * batch * sum(layer_lengths(self.manifest, length))
        # Layout "append" reads one set of buffers and writes another.
        return once if self.manifest.cache.layout == "in_place" else 2 * once

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""
        kind = InPlaceStore if self.manifest.cache.layout == "in_place" else AppendStore
        return kind(self, batch, length)

    def open_pool(self, slots: int, block_size: int) -> BlockPool:
        """See `Backend.open_pool`."""
        return HostBlocks(self.manifest, slots, block_size)

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """A context manager for prefill and scoring; at its end, memory they freed is released."""
        with self._heap.call():
            yield
        self._forget_token_rows()

    def after_step(self, tokens: int) -> None:
        """Called after a decode step that read `tokens` rows of the embedding table."""
        self._tokens_read += tokens
        if self._tokens_read >= _TOKENS_MAPPED:
            self._forget_token_rows()

    def _forget_token_rows(self) -> None:
        """Release the mapped pages of embedding rows that were read so far."""
        self._tokens_read = 0
        # If another thread is loading a graph, this can wait until the next call.
        if self._lock.acquire(blocking=False):
            try:
                for graph in self._sessions:  # without a session, the mapping may no longer exist
                    forget_pages(self._factory.token_rows.get(graph, ()))
            finally:
                self._lock.release()

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._closed = True
            self._sessions.clear()
        self.kept_block.close()
        give_back()


def _after_fork() -> None:
    keep_sessions_for_ever()
    for backend in list(_live):
        backend.begin()


in_every_child(_after_fork)


def _spare(weights: int) -> int:
    """Bytes of freed heap kept for the next prompt, for `weights` bytes of weights."""
    return min(weights // _SPARE_SHARE, _LARGEST_SPARE)
