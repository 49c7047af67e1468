"""Runs a text through prefill and decode with one cache, recording every place on the way."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.comparison.metrics import relative_l2
from neo_export.comparison.places import CACHED
from neo_export.comparison.trace import CacheCheck, Trace
from neo_export.files.mapped_memory import drop_pages, scratch_array
from neo_export.quantize.kv_cache import stored_cache
from neo_runtime.backends.base import score_in_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from neo_export.comparison.places import Place
    from neo_export.quantize.kv_cache import CacheSteps
    from neo_runtime.backends.base import CacheStore
    from neo_runtime.bundle.manifest import Manifest, Probe
    from numpy.typing import NDArray

    from neo_tools.diff.probed_backend import Probed

__all__ = ["Segment", "segments_of", "spoil", "trace_cached_path", "trace_scored"]

_WRONG = 0.1
"""A cached position with this relative L2 error also counts as wrong in later checks."""


@dataclass(frozen=True)
class Segment:
    """Consecutive positions that one graph computes: prefill in one call, decode token by token."""

    graph: str
    start: int
    stop: int


def segments_of(length: int, decoded: Sequence[tuple[int, int]], chunk: int) -> tuple[Segment, ...]:
    """The given ranges as decode segments, the rest as chunks of prefill, ordered by position."""
    segments: list[Segment] = []
    at = 0
    for start, stop in [*decoded, (length, length)]:
        segments += [
            Segment("prefill", first, min(first + chunk, start))
            for first in range(at, start, chunk)
        ]
        if stop > start:
            segments.append(Segment("decode", start, stop))
        at = stop
    return tuple(segments)


def spoil(store: CacheStore) -> None:
    """Fill an empty cache with values that no text leaves, if the engine exposes its cache."""
    with contextlib.suppress(NotImplementedError):
        store.spoil()


def trace_cached_path(
    backend: Probed,
    ids: NDArray[np.int64],
    segments: Sequence[Segment],
    step: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Trace], list[CacheCheck]]:
    """Run one text through one cache.

    Args:
        backend: a backend with probed sessions.
        ids: token ids [S].
        segments: segments that cover the positions from 0 on without a gap.
        step: called with the number of tokens done since the last call.

    Returns:
        One trace per segment, and a check of the cache after each segment and after the first
        token of each decode segment.
    """
    recorder = _Recorder(backend.manifest, segments[-1].stop, backend.cache_steps)
    backend.sink = recorder.take
    store = backend.open_cache(1, segments[-1].stop)
    try:
        spoil(store)
        for segment in segments:
            part = ids[segment.start : segment.stop]
            if segment.graph == "prefill":
                recorder.keep_logits(store.prefill([part], len(part)).full(), segment.stop - 1)
                step(len(part))
            else:
                for at, token in enumerate(part, start=segment.start):
                    recorder.keep_logits(store.decode(np.array([token])).full(), at)
                    step(1)
                    if at == segment.start < segment.stop - 1:
                        recorder.check(store, "decode")
            recorder.check(store, segment.graph)
            recorder.rest()
            recorder.close(segment)
    finally:
        store.close()
        backend.sink = lambda values: None
    return recorder.traces, recorder.checks


def trace_scored(backend: Probed, ids: NDArray[np.int64]) -> Trace:
    """Run one text through the score graph, in as many calls as the runtime would use."""
    recorder = _Recorder(backend.manifest, len(ids), None)
    backend.sink = recorder.take
    store = backend.open_cache(1, len(ids))
    try:
        vocab_size = backend.manifest.model.vocab_size
        logits = score_in_chunks(store, ids, vocab_size, backend.scored_at_once)
    finally:
        store.close()
        backend.sink = lambda values: None
    return recorder.scored(logits)


class _Recorder:
    """Collects the values of all calls in arrays as long as the text."""

    def __init__(self, manifest: Manifest, length: int, steps: CacheSteps | None) -> None:
        self._manifest = manifest
        self._steps = steps
        self._probes: Mapping[Place, Probe] = {(p.layer, p.place): p for p in manifest.probes}
        self._values: dict[str, NDArray[Any]] = {}
        self._length = length
        self._selected: set[str] = set()
        self._done = 0
        self._logits: list[NDArray[np.float32]] = []
        self._logits_at: list[int] = []
        self._known_wrong: dict[Place, NDArray[np.bool_]] = {}
        self.traces: list[Trace] = []
        self.checks: list[CacheCheck] = []

    def take(self, values: dict[str, NDArray[Any]]) -> None:
        """Record values [1, S, width] of the next S positions, or [1, 1, width] of the last one."""
        stop = self._done + max(value.shape[1] for value in values.values())
        for name, value in values.items():
            if name not in self._values:
                shape = (self._length, value.shape[-1])
                self._values[name] = scratch_array(shape, str(value.dtype))
            start = stop - value.shape[1]
            self._values[name][start:stop] = value[0]
            if start > self._done:
                self._selected.add(name)
        self._done = stop

    def keep_logits(self, logits: NDArray[np.float32], at: int) -> None:
        """Record the logits [1, V] of the position `at`."""
        self._logits.append(logits[0].copy())
        self._logits_at.append(at)

    def rest(self) -> None:
        """Release the recorded values from resident memory."""
        drop_pages(*self._values.values())

    def close(self, segment: Segment) -> None:
        """End a segment: its trace is complete."""
        self.traces.append(
            Trace(
                graph=segment.graph,
                start=segment.start,
                length=segment.stop - segment.start,
                probes=self._probes,
                values=self._values,
                logits=np.stack(self._logits),
                logits_at=np.array(self._logits_at, dtype=np.int64),
                selected=frozenset(self._selected),
            )
        )
        self._logits, self._logits_at = [], []
        self._selected.clear()

    def scored(self, logits: NDArray[np.float32]) -> Trace:
        """All positions as one trace of the score graph; `logits` [S, V]."""
        kept = scratch_array(logits.shape, "float32")
        kept[:] = logits
        return Trace.scored(self._probes, self._values, kept)

    def check(self, store: CacheStore, graph: str) -> None:
        """Compare the cache's content with the keys and values that were computed for it."""
        try:
            contents = store.contents()
        except NotImplementedError:
            return
        history = Trace(graph, 0, self._done, self._probes, self._values)
        errors: dict[Place, NDArray[np.float64]] = {}
        late: set[Place] = set()
        for layer in range(self._manifest.model.num_layers):
            pair = tuple(contents[2 * layer + part][0] for part in range(2))
            own = tuple(history.get(layer, place) for place in CACHED.values())
            if self._steps is not None:
                steps = self._steps.key[layer], self._steps.value[layer]
                pair, own = _widened(pair, steps), _stored(own, steps)
            slots = self._slots(layer, pair[0], own[0])
            for place, cached, computed in zip(CACHED, pair, own, strict=True):
                found = self._compared((layer, place), cached, computed, slots)
                errors[layer, place] = found
                if _is_late(found, cached, computed, slots):
                    late.add((layer, place))
        self.checks.append(CacheCheck(graph, np.arange(self._done), errors, frozenset(late)))

    def _compared(
        self,
        place: Place,
        cached: NDArray[Any],
        computed: NDArray[np.float32],
        slots: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Errors [T]; NaN if position t has no slot, or was already found to be wrong."""
        result = np.full(len(computed), np.nan)
        kept = slots >= 0
        rows = cached[:, slots[kept]].transpose(1, 0, 2).reshape(kept.sum(), -1)
        if np.array_equal(rows, computed[kept].astype(rows.dtype)):
            result[kept] = 0.0
        else:
            result[kept] = relative_l2(rows, computed[kept])
            if len(computed) <= cached.shape[1]:
                # NaN: the slot was never written. (In a buffer that was full it stays NaN: a graph
                # with too small a window keeps too little, which is a fault of its attention.)
                result[kept] = np.nan_to_num(result[kept], nan=np.inf)
        known = self._known_wrong.setdefault(place, np.zeros(self._length, dtype=np.bool_))
        known = known[: len(result)]
        found_now = ~known
        known |= ~(result <= _WRONG) & kept
        return np.where(found_now, result, np.nan)

    def _slots(
        self, layer: int, cached: NDArray[Any], computed: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Slot of each position [T]; −1 for positions that may have been evicted.

        Until a buffer is full, slot = position. After that, a local layer's graph may move the kept
        positions to the front: the newest one is found by its key, the others are before it.
        """
        total, capacity = len(computed), cached.shape[1]
        positions = np.arange(total)
        if total <= capacity:
            kept = positions
        else:
            flat = cached.transpose(1, 0, 2).reshape(capacity, -1).astype(np.float32)
            distances = np.linalg.norm(flat - computed[-1], axis=-1)
            newest = int(np.nan_to_num(distances, nan=np.inf).argmin())  # see `CacheStore.spoil`
            kept = positions - (total - 1 - newest)
        window = self._manifest.model.window_size
        local = self._manifest.model.attention_layers[layer] == "local"
        needed = (positions >= total - window) if local else positions >= 0
        return np.where(needed & (kept >= 0), kept, -1)


def _stored(
    pair: tuple[NDArray[np.float32], ...], steps: tuple[NDArray[np.float32], ...]
) -> tuple[NDArray[np.float32], ...]:
    """Keys and values [T, H], rounded as an int8 cache stores them."""
    return tuple(stored_cache(x, step) for x, step in zip(pair, steps, strict=True))


def _widened(
    pair: tuple[NDArray[Any], ...], steps: tuple[NDArray[np.float32], ...]
) -> tuple[NDArray[np.float32], ...]:
    """The integers of an int8 cache, [heads, slots, D], times the steps [H] of its channels."""
    return tuple(
        (x * step.reshape(x.shape[0], 1, x.shape[2])).astype(np.float32)
        for x, step in zip(pair, steps, strict=True)
    )


def _is_late(
    errors: NDArray[np.float64],
    cached: NDArray[Any],
    computed: NDArray[np.float32],
    slots: NDArray[np.int64],
) -> bool:
    """Whether the wrong positions are one slot behind their own."""
    wrong = np.flatnonzero(~(np.nan_to_num(errors) <= _WRONG))
    wrong = wrong[slots[wrong] + 1 < cached.shape[1]]
    if not len(wrong):
        return False
    behind = cached[:, slots[wrong] + 1].transpose(1, 0, 2).reshape(len(wrong), -1)
    return bool(np.median(relative_l2(behind, computed[wrong])) <= _WRONG)
