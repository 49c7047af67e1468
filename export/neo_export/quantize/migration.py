"""Activation outliers moved into the weights: the same function, easier to round.

    x · Wᵀ + b  =  ((x − z) / s) · (W · s)ᵀ + (b + W z)      s > 0 and z: one a channel of x

One row of x shares a scale when it is rounded, so that a channel far larger than the rest costs
all others their precision. Weights have room for what varies (s: SmoothQuant, arXiv:2211.10438,
equation 3), the bias for what does not (z: Outlier Suppression+, arXiv:2304.09145). Where a layer
norm gives x, both are folded into its weight and bias and cost nothing. The inputs of out_proj and
c_proj are shifted and multiplied in the graph (`neo_export.passes.migrate_activations`): folding
the former into v_proj would rescale cached values, whose scales and statistics others rely on. So
no place that tools look at changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neo_export.gpt_neo.parameters import input_place

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Migration", "Read"]

Read = Callable[[str], NDArray[np.float32]]
"""Name of a parameter → its values."""
Moments = tuple[NDArray[np.float32], NDArray[np.float32]]

_NORMS = ("ln_1", "ln_2")


@dataclass(frozen=True)
class Migration:
    """What happens to each place's channels."""

    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Place → s [C]; places that stay as they are do not occur. A tied table's rows are divided by
    its input's where they are looked up."""
    shifts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Place → z [C]; only places that have a scale, and readers with a bias."""

    @property
    def in_graph(self) -> tuple[str, ...]:
        """Places that are shifted and multiplied in the graph: no norm does it."""
        return tuple(place for place in self.scales if not _is_norm(place))

    def reading(self, read: Read) -> Read:
        """The checkpoint as it is stored: norms divided, matrices multiplied, biases shifted.

        Args:
            read: gives a weight of the checkpoint by name.
        """

        def migrated(name: str) -> NDArray[np.float32]:
            values = read(name)
            owner, part = name.rsplit(".", 1)
            if _is_norm(owner) and owner in self.scales:
                shift = self.shifts.get(owner) if part == "bias" else None
                return (values if shift is None else values - shift) / self.scales[owner]
            place = _input_of(owner)
            if part == "bias" and place in self.shifts:
                return values + _product(read(f"{owner}.weight"), self.shifts[place])
            if part == "weight" and place in self.scales:
                return values * self.scales[place]
            return values

        return migrated if self.scales else read

    def restoring(self, stored: Read) -> Read:
        """Stored weights as the checkpoint would have them: what a reference computes with.

        Args:
            stored: gives a weight as it was stored, read back: what `reading` gave, rounded.
        """

        def restored(name: str) -> NDArray[np.float32]:
            values = stored(name)
            owner, part = name.rsplit(".", 1)
            if _is_norm(owner) and owner in self.scales:
                shift = self.shifts.get(owner) if part == "bias" else None
                values = values * self.scales[owner]
                return values if shift is None else values + shift
            place = _input_of(owner)
            if part == "bias" and place in self.shifts:
                return values - _product(restored(f"{owner}.weight"), self.shifts[place])
            if part == "weight" and place in self.scales:
                return values / self.scales[place]
            return values

        return restored if self.scales else stored

    def second_moment(self, place: str, moment: Moments) -> NDArray[np.floating[Any]]:
        """E[x xᵀ] of a place as its stored matrices see it.

        Args:
            place: its name.
            moment: (E[x xᵀ], E[x]) as the statistics have them.
        """
        if place not in self.scales:
            return moment[0]
        # A large mean leaves little of what it is subtracted from.
        second, mean = (values.astype(np.float64) for values in moment)
        if place in self.shifts:
            shift = self.shifts[place].astype(np.float64)
            cross = np.outer(mean, shift)
            second = second - cross - cross.T + np.outer(shift, shift)
        scale = self.scales[place].astype(np.float64)
        return second / scale / scale[:, None]


def _is_norm(place: str) -> bool:
    return place.rsplit(".", 1)[-1] in _NORMS


def _input_of(module: str) -> str:
    """The place that a linear module reads; "" for anything else."""
    try:
        return input_place(f"{module}.weight")
    except ValueError:
        return ""


def _product(weight: NDArray[np.float32], shift: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weight · shift, summed in float64."""
    sums: NDArray[np.float64] = np.einsum("ij,j->i", weight, shift, dtype=np.float64)
    return sums.astype(np.float32)
