"""Outlier migration: moves activation outliers into the weights, without changing the function.

    x · Wᵀ + b  =  ((x − z) / s) · (W · s)ᵀ + (b + W z)      s > 0 and z: one per channel of x

All channels of a row of x share a scale when they are rounded, so a channel far larger than the
rest costs the others their precision. The weights absorb the part that varies (s: SmoothQuant,
arXiv:2211.10438, equation 3), the bias absorbs the constant part (z: Outlier Suppression+,
arXiv:2304.09145). Where x is the output of a layer norm, both are folded into the norm's weight and
bias and cost nothing. The inputs of out_proj and c_proj are shifted and multiplied in the graph
(`neo_export.passes.migrate_activations`): folding out_proj's into v_proj would rescale the cached
values, whose scales and statistics are used elsewhere. So no place that tools inspect changes.
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
    """The scale s and shift z of each place's channels."""

    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Place → s [C]; unchanged places are left out. Rows of a tied table are divided by the s of
    the head's input when they are looked up."""
    shifts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Place → z [C]; only places that have a scale and whose readers have a bias."""

    @property
    def in_graph(self) -> tuple[str, ...]:
        """Places that are shifted and multiplied in the graph, because no norm can do it."""
        return tuple(place for place in self.scales if not _is_norm(place))

    def reading(self, read: Read) -> Read:
        """The checkpoint with the migration applied: norms, matrices and biases.

        Args:
            read: returns a weight of the checkpoint by name.
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
        """Stored weights with the migration undone: what a reference computes with.

        Args:
            stored: returns a weight as it was stored, dequantized: that of `reading`, rounded.
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
        """E[x xᵀ] of a place after the migration, as input of the stored matrices.

        Args:
            place: its name.
            moment: (E[x xᵀ], E[x]) before it, from the statistics.
        """
        if place not in self.scales:
            return moment[0]
        # In float64: subtracting a large mean cancels most digits.
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
