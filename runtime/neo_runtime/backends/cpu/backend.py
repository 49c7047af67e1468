"""The bundle's graphs as onnxruntime sessions on the CPU."""

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
"""Of freed memory, as much as this part of the weights stays for the next prompt, and no more than
that: 32 MB of int8 at the 1.3B shape, where a prompt of 128 tokens takes 25; 18 MB of int4, enough
for 100 tokens."""
_TOKENS_MAPPED = 16
"""Tokens that decode may read before their rows of the table leave its memory again: Linux maps up
to 300 kB around each of them."""


_live: weakref.WeakSet[OnnxRuntimeBackend] = weakref.WeakSet()


class OnnxRuntimeBackend(Backend):
    """Sessions are made when first used, one a graph, and shared by all threads.

    A forked child makes its own: the threads of its parent's are not there.
    """

    described = "CPU"

    def __init__(self, factory: SessionFactory) -> None:
        """Prepare; no graph is loaded yet. The factory is this backend's alone."""
        self._factory = factory
        self._closed = False
        self.manifest = factory.manifest
        if is_quantized(self.manifest.precision):
            # Activations that stay in the processor's caches win a few percent. Float32 wants
            # longer chunks: it reads every weight once a chunk, in an order that costs more.
            self.default_chunk = 256
        hold_within_calls()
        self._tokens_read = 0
        """Since the rows of tokens left memory; threads may miscount."""
        self.begin()
        _live.add(self)

    def begin(self) -> None:
        """Without sessions; in a forked child, too, where nobody holds the parent's locks."""
        self._sessions: dict[str, Any] = {}
        self._factory.token_rows.clear()
        self._lock = threading.Lock()
        self._heap = Heap(_spare(self.manifest.files[WEIGHTS_NAME].size))
        self.kept_block = KeptBlock()
        """Of the cache that was closed last."""

    def session(self, graph: str) -> Any:
        """The `onnxruntime.InferenceSession` of "prefill", "decode" or "score"."""
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
        """Bytes of prepacked weights that are kept on disk for this bundle."""
        store = self._factory.prepacked
        return store.bytes_on_disk if store is not None else 0

    def translated(self) -> AbstractContextManager[None]:
        """Around each run: turn what onnxruntime raises into this project's errors."""
        return self._factory.translated()

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`."""
        layer = position_bytes(self.manifest) // self.manifest.model.num_layers
        once = layer * batch * sum(layer_lengths(self.manifest, length))
        # Appending writes the longer cache beside the shorter one that it reads.
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
        """Around a prompt: behind it the memory that it took, and nothing else needs, goes back."""
        with self._heap.call():
            yield
        self._forget_token_rows()

    def after_step(self, tokens: int) -> None:
        """Behind a step of decode that read so many tokens."""
        self._tokens_read += tokens
        if self._tokens_read >= _TOKENS_MAPPED:
            self._forget_token_rows()

    def _forget_token_rows(self) -> None:
        """Take the rows of tables that were read for tokens so far out of this process."""
        self._tokens_read = 0
        # While somebody loads a graph this can wait until the next time.
        if self._lock.acquire(blocking=False):
            try:
                for graph in self._sessions:  # of others what was mapped may be gone
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
    """Bytes of freed memory that stay for the next prompt, for weights of so many bytes."""
    return min(weights // _SPARE_SHARE, _LARGEST_SPARE)
