"""The values that one graph computed at consecutive positions of a text, place by place."""

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

    The values of the positions before `start`, from any graph, are its history.
    """

    graph: str
    start: int
    length: int
    probes: Mapping[Place, Probe]
    values: Mapping[str, NDArray[Any]]
    """Values by the probed value's name: [start + length or more, width], from the text's first
    position on, in the graph's own type."""
    logits: NDArray[np.float32] | None = None
    """[rows, V], at the positions `logits_at`."""
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
        """The trace of all positions of a text in the score graph; `logits` [S, V]."""
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
        """Release the values from resident memory until they are read again."""
        drop_pages(*self.values.values())

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions in the text, [length]."""
        return np.arange(self.start, self.start + self.length, dtype=np.int64)

    def has(self, layer: int | None, place: str) -> bool:
        """Whether the graph shows this place."""
        return (layer, place) in self.probes

    def rows(self, layer: int | None, place: str) -> NDArray[np.int64]:
        """Rows of `get` that the graph computed at this place, [n]; the other rows are zeros."""
        probe = self.probes.get((layer, place))  # None for the cache's content
        if probe is None or probe.value not in self.selected:
            return np.arange(self.length, dtype=np.int64)
        assert self.logits_at is not None
        return self.logits_at - self.start

    def get(self, layer: int | None, place: str) -> NDArray[np.float32]:
        """Values of a place, float32 [length, width]; a view if the graph computes in float32."""
        return self.with_history(layer, place)[self.start :]

    def with_history(self, layer: int | None, place: str) -> NDArray[np.float32]:
        """The same for all positions from the text's first on, [start + length, width]."""
        probe = self.probes[layer, place]
        value = self.values[probe.value][: self.start + self.length]
        chosen = value if probe.channels is None else value[:, slice(*probe.channels)]
        return np.asarray(chosen, dtype=np.float32)


@dataclass(frozen=True)
class CacheCheck:
    """The cache's content after a call of one graph, compared with the computed values."""

    graph: str
    positions: NDArray[np.int64]
    """Positions in the text, [n]."""
    errors: Mapping[Place, NDArray[np.float64]]
    """Relative L2 errors [n] of `cached_key` and `cached_value` of layers; NaN for a position that
    was evicted, or was already found to be wrong after an earlier call."""
    late: frozenset[Place] = frozenset()
    """Places whose entries are all one slot too late."""


@dataclass
class Text:
    """Token ids, and the values that the graphs of a bundle computed for them."""

    ids: NDArray[np.int64]
    traces: Sequence[Trace] = ()
    cache_checks: Sequence[CacheCheck] = ()
