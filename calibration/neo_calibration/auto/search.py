"""Computes the Pareto frontier of plans, size against divergence, from the groups' sensitivities.

A plan's divergence is estimated as the sum over its groups. That is not exact, so relevant plans
are measured (`judge`), and the budget is corrected until a measured plan keeps the limit.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from neo_export.quantize.plan import Storage, WeightPlan, is_planned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from neo_calibration.auto.sensitivity import Group

__all__ = ["Candidate", "Frontier", "FrontierPlan", "frontier_of", "rest_of"]

EXACT = Storage("fp32")
_BUCKETS = 1 << 15
"""Number of distinct sizes between the smallest and the largest plan. Each group rounds by at most
one step: 0.3 % of the range for the 97 groups of 24 layers, and usually far less."""


@dataclass(frozen=True)
class Candidate:
    """One storage of one group."""

    storage: Storage
    size: int
    """Bytes."""
    divergence: float
    """Mean KL divergence from float32 with only this group in this storage, nats."""


@dataclass(frozen=True)
class FrontierPlan:
    """One plan, with its size and its estimated divergence."""

    plan: WeightPlan
    size: int
    """Bytes of its matrices."""
    divergence: float
    """Estimated divergence: the sum over the groups, nats."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """Plans from the most exact to the smallest; each is smaller and worse than the one before."""

    groups: tuple[tuple[Group, tuple[Candidate, ...]], ...]
    kept: tuple[tuple[str, int], ...]
    """Names and bytes of matrices in no group, which stay float32 in every plan."""
    rest: int
    """Bytes of everything but the matrices, approximately: alignment and the vector of an int4
    table are not counted exactly."""
    sizes: NDArray[np.int64]
    """[plans]: bytes of the matrices, kept ones included; decreasing."""
    divergences: NDArray[np.float64]
    """[plans]: estimates in nats; increasing."""
    choices: NDArray[np.int8]
    """[plans, groups]: index of the group's candidate."""

    def __len__(self) -> int:
        return len(self.sizes)

    def at(self, index: int) -> FrontierPlan:
        """The plan at an index."""
        return self._plan(
            [c[i] for (_, c), i in zip(self.groups, self.choices[index], strict=True)]
        )

    def last_within(self, budget: float) -> int:
        """Index of the smallest plan whose estimate is within a budget (nats); at least 0."""
        return max(0, int(np.searchsorted(self.divergences, budget, side="right")) - 1)

    def first_fitting(self, limit: int) -> int:
        """Index of the best plan of at most this many bytes; of the smallest if none fits."""
        return min(int(np.searchsorted(-self.sizes, -limit)), len(self) - 1)

    def uniform(self, storage: Storage) -> FrontierPlan:
        """The plan with one storage for all groups; it may be off the frontier."""
        return self._plan(
            [next(c for c in found if c.storage == storage) for _, found in self.groups]
        )

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The storages that every group has a candidate for, except float32."""
        sets = [{c.storage for c in found} for _, found in self.groups]
        return tuple(sorted(set.intersection(*sets) - {EXACT})) if sets else ()

    def _plan(self, chosen: Sequence[Candidate]) -> FrontierPlan:
        """A plan with the most frequent storage as default, and all others by name."""
        storages = {
            name: candidate.storage
            for (group, _), candidate in zip(self.groups, chosen, strict=True)
            for name in group.names
        } | {name: EXACT for name, _ in self.kept}
        # Ties are broken by name, so that the plan is deterministic.
        counted = Counter(storages.values()).items()
        default = min(counted, key=lambda item: (-item[1], str(item[0])))[0]
        named = tuple((name, s) for name, s in storages.items() if s != default)
        return FrontierPlan(
            WeightPlan(default, named),
            sum(c.size for c in chosen) + sum(size for _, size in self.kept),
            sum(c.divergence for c in chosen),
        )


def frontier_of(
    groups: Sequence[Group],
    shapes: Mapping[str, tuple[int, ...]],
    divergences: Mapping[tuple[Group, Storage], float],
) -> Frontier:
    """All plans that no other plan beats in both bytes and the sum of divergences.

    Groups are added one after the other, keeping only the Pareto-optimal sums: exact up to the
    rounding of `_BUCKETS`. (Steps along each group's convex hull would miss the plans between two
    steps of a large matrix. A tied table can be half of a small model: int4 in smaller blocks for
    everything would then be better than any plan of its size on the hull.)

    Args:
        groups: groups of matrices that share a storage; matrices in no group stay float32.
        shapes: shapes of the model's parameters, by name.
        divergences: divergence of each group in each storage except float32, nats.
    """
    options = tuple((group, _candidates(group, shapes, divergences)) for group in groups)
    grouped = {name for group in groups for name in group.names}
    matrices = {name: shape for name, shape in shapes.items() if is_planned(name, shape)}
    kept = tuple((n, EXACT.bytes_of(*s)) for n, s in matrices.items() if n not in grouped)
    sizes = np.array([sum(size for _, size in kept)], np.int64)
    costs, choices = np.zeros(1), np.zeros((1, 0), np.int8)
    span = sum(max(c.size for c in found) - min(c.size for c in found) for _, found in options)
    for _, found in options:
        all_sizes = np.add.outer(sizes, np.array([c.size for c in found], np.int64)).ravel()
        all_costs = np.add.outer(costs, np.array([c.divergence for c in found])).ravel()
        best = _pareto_optimal(all_sizes, all_costs, max(1, span // _BUCKETS))
        parents, picked = np.divmod(best, len(found))
        sizes, costs = all_sizes[best], all_costs[best]
        choices = np.column_stack((choices[parents], picked.astype(np.int8)))
    return Frontier(options, kept, rest_of(shapes), sizes[::-1], costs[::-1], choices[::-1])


def rest_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of parameters that are not in a plan: vectors, and the position table in float16.

    Args:
        shapes: shapes of the model's parameters, by name.
    """
    others = [shape for name, shape in shapes.items() if not is_planned(name, shape)]
    return sum(math.prod(shape) * (4 if len(shape) == 1 else 2) for shape in others)


def _candidates(
    group: Group,
    shapes: Mapping[str, tuple[int, ...]],
    divergences: Mapping[tuple[Group, Storage], float],
) -> tuple[Candidate, ...]:
    def size(storage: Storage) -> int:
        return sum(storage.bytes_of(*shapes[name]) for name in group.names)

    found = [Candidate(EXACT, size(EXACT), 0.0)]
    for (owner, storage), divergence in divergences.items():
        if owner == group:
            found.append(Candidate(storage, size(storage), divergence))
    return tuple(found)


def _pareto_optimal(
    sizes: NDArray[np.int64], costs: NDArray[np.float64], bucket: int
) -> NDArray[np.intp]:
    """Indices of the Pareto-optimal entries by increasing size; at most one per `bucket` bytes."""
    order = np.lexsort((costs, sizes))
    lowest = np.minimum.accumulate(costs[order])
    better = np.ones(len(order), bool)
    better[1:] = lowest[1:] < lowest[:-1]
    order = order[better]
    place = sizes[order] // bucket
    last = np.ones(len(order), bool)  # the best of its bucket
    last[:-1] = place[1:] != place[:-1]
    last[0] = True  # the smallest of all
    return order[last]
