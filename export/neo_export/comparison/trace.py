"""What one graph computed at consecutive positions of a text, place by place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_export.files.mapped_memory import drop_pages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from neo_runtime.bundle.manifest import Probe
    from numpy.typing import NDArray

    from neo_export.comparison.places import Place

__all__ = ["CacheCheck", "Text", "Trace"]


@dataclass(frozen=True)
class Trace:
    """Hidden states of `length` positions from `start` on, all computed by one graph.

    What was computed for positions before `start`, by whatever graph, is its history.
    """

    graph: str
    start: int
    length: int
    probes: Mapping[Place, Probe]
    values: Mapping[str, NDArray[Any]]
    """By the probed value's name: [start + length or more, width], of the text's first position
    on, in the graph's own type."""
    logits: NDArray[np.float32] | None = None
    """[rows, V], of the positions `logits_at`."""
    logits_at: NDArray[np.int64] | None = None
    """Positions in the text, [rows]."""
    selected: frozenset[str] = frozenset()
    """Probed values that the graph computes only at the positions `logits_at`."""

    @classmethod
    def scored(
        cls,
        probes: Mapping[Place, Probe],
        values: Mapping[str, NDArray[Any]],
        logits: NDArray[np.float32],
    ) -> Trace:
        """All positions of a text by the score graph; `logits` [S, V]."""
        length = len(logits)
        return cls(
            graph="score",
            start=0,
            length=length,
            probes=probes,
            values=values,
            logits=logits,
            logits_at=np.arange(length, dtype=np.int64),
        )

    def rest(self) -> None:
        """Leave resident memory until something is read again."""
        drop_pages(*self.values.values())

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions in the text, [length]."""
        return np.arange(self.start, self.start + self.length, dtype=np.int64)

    def has(self, layer: int | None, place: str) -> bool:
        """Whether the graph shows this place."""
        return (layer, place) in self.probes

    def rows(self, layer: int | None, place: str) -> NDArray[np.int64]:
        """Rows of `get` that the graph computed at this place, [n]; the others are zeros."""
        probe = self.probes.get((layer, place))  # None of what a cache holds
        if probe is None or probe.value not in self.selected:
            return np.arange(self.length, dtype=np.int64)
        assert self.logits_at is not None
        return self.logits_at - self.start

    def get(self, layer: int | None, place: str) -> NDArray[np.float32]:
        """float32 [length, width]; a view where the graph computes in float32."""
        return self.with_history(layer, place)[self.start :]

    def with_history(self, layer: int | None, place: str) -> NDArray[np.float32]:
        """The same of all positions from the text's first on, [start + length, width]."""
        probe = self.probes[layer, place]
        value = self.values[probe.value][: self.start + self.length]
        chosen = value if probe.channels is None else value[:, slice(*probe.channels)]
        return np.asarray(chosen, dtype=np.float32)


@dataclass(frozen=True)
class CacheCheck:
    """What a cache held after a call of one graph, against what was computed for it."""

    graph: str
    positions: NDArray[np.int64]
    """Of the text, [n]."""
    errors: Mapping[Place, NDArray[np.float64]]
    """`cached_key` and `cached_value` of layers: relative L2, [n]; NaN where the position had
    left the cache, or was found to be wrong after an earlier call."""
    late: frozenset[Place] = frozenset()
    """Places that held each position's entry one slot further than it belongs."""


@dataclass
class Text:
    """Token ids, and what the graphs of a bundle computed for them."""

    ids: NDArray[np.int64]
    traces: Sequence[Trace] = ()
    cache_checks: Sequence[CacheCheck] = ()
