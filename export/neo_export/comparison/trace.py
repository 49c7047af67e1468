"""What one graph computed at consecutive positions of a text, place by place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from neo_runtime.manifest import Probe
    from numpy.typing import NDArray

    from neo_export.comparison.places import Place

__all__ = ["Text", "Trace"]


@dataclass
class Trace:
    """Hidden states of `length` positions from `start` on, all computed by one graph."""

    graph: str
    start: int
    length: int
    probes: Mapping[Place, Probe]
    values: Mapping[str, NDArray[Any]]
    """By the probed value's name: [length, width], in the graph's own type."""
    before: Trace | None = None
    """What was computed for positions 0 to start − 1, where the graph had a past."""
    cache_errors: dict[Place, NDArray[np.float64]] = field(default_factory=dict)
    """`cached_key` and `cached_value` of layers: relative L2 between what the cache held of each
    position afterwards and what the graph computed for it, [length]; NaN where it had left."""
    logits: NDArray[np.float32] | None = None
    """[rows, V], of the positions `logits_at`."""
    logits_at: NDArray[np.int64] | None = None
    """Positions in the text, [rows]."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions in the text, [length]."""
        return np.arange(self.start, self.start + self.length, dtype=np.int64)

    def has(self, layer: int | None, place: str) -> bool:
        """Whether the graph shows this place."""
        return (layer, place) in self.probes

    def get(self, layer: int | None, place: str) -> NDArray[np.float32]:
        """float32 [length, width]; a view where the graph computes in float32."""
        probe = self.probes[layer, place]
        value = self.values[probe.value]
        chosen = value if probe.channels is None else value[:, slice(*probe.channels)]
        return np.asarray(chosen, dtype=np.float32)

    def with_history(self, layer: int | None, place: str) -> NDArray[np.float32]:
        """The same of all positions from the text's first on, [start + length, width]."""
        own = self.get(layer, place)
        if self.start == 0:
            return own
        assert self.before is not None
        return np.concatenate([self.before.with_history(layer, place)[: self.start], own])


@dataclass
class Text:
    """Token ids, and what the graphs of a bundle computed for them."""

    ids: NDArray[np.int64]
    traces: Sequence[Trace] = ()
