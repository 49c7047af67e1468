"""From what each group costs in each storage to plans: the frontier of size against divergence.

Divergences of single groups are added up. That is not exact, so plans that matter are measured
(`judge`), and the budget is corrected until the measured one holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from neo_export.quantize.plan import Storage, WeightPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from neo_calibration.auto.sensitivity import Group

__all__ = ["Candidate", "Frontier", "FrontierPlan", "frontier_of"]

EXACT = Storage("fp32")


@dataclass(frozen=True)
class Candidate:
    """One storage of one group."""

    storage: Storage
    size: int
    """Bytes."""
    divergence: float
    """Mean KL from float32 with this group alone stored so, nats."""


@dataclass(frozen=True)
class FrontierPlan:
    """One plan of the frontier."""

    plan: WeightPlan
    size: int
    """Bytes of its matrices."""
    divergence: float
    """Sum of the groups' divergences: an estimate."""


@dataclass(frozen=True)
class Frontier:
    """Plans from all float32 to the smallest: each smaller and worse than the one before."""

    plans: tuple[FrontierPlan, ...]

    def within_divergence(self, budget: float) -> FrontierPlan:
        """The smallest plan whose estimate is within the budget."""
        return next(plan for plan in reversed(self.plans) if plan.divergence <= budget)

    def within_size(self, limit: int) -> FrontierPlan | None:
        """The best plan of at most this many bytes; None where even the smallest is larger."""
        return next((plan for plan in self.plans if plan.size <= limit), None)


def frontier_of(
    groups: Sequence[Group],
    shapes: Mapping[str, tuple[int, ...]],
    divergences: Mapping[tuple[Group, Storage], float],
) -> Frontier:
    """Give bytes up where they cost least divergence, one step after the other.

    For each group only storages on the lower convex hull of (bytes, divergence) count; then taking
    the steps of all groups in the order of divergence a byte saved gives, for each size that it
    passes, the least sum (Lagrangian relaxation: every plan is the best for some price of a byte).
    """
    hulls = {group: _hull(_candidates(group, shapes, divergences)) for group in groups}
    chosen = {group: hull[0] for group, hull in hulls.items()}
    steps = sorted(
        (_price(one, two), at, number, two)
        for number, hull in enumerate(hulls.values())
        for at, (one, two) in enumerate(pairwise(hull))
    )
    plans = [_plan(chosen)]
    for _, _, number, candidate in steps:
        chosen[groups[number]] = candidate
        plans.append(_plan(chosen))
    return Frontier(tuple(plans))


def _candidates(
    group: Group,
    shapes: Mapping[str, tuple[int, ...]],
    divergences: Mapping[tuple[Group, Storage], float],
) -> list[Candidate]:
    def size(storage: Storage) -> int:
        return sum(storage.bytes_of(*shapes[name]) for name in group.names)

    found = [Candidate(EXACT, size(EXACT), 0.0)]
    for (owner, storage), divergence in divergences.items():
        if owner == group:
            found.append(Candidate(storage, size(storage), divergence))
    return found


def _hull(candidates: list[Candidate]) -> list[Candidate]:
    """The lower convex hull, from the largest and most exact on."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.size, c.divergence)):
        if hull and candidate.size == hull[-1].size:
            continue
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _price(one: Candidate, two: Candidate) -> float:
    """Divergence for each byte saved by going from one to two."""
    return (two.divergence - one.divergence) / max(1, one.size - two.size)


def _plan(chosen: Mapping[Group, Candidate]) -> FrontierPlan:
    """The most frequent storage is the default, all others by name."""
    storages = {name: c.storage for group, c in chosen.items() for name in group.names}
    # Of two as frequent ones the one that sorts first: a plan does not depend on chance.
    default = min(Counter(storages.values()).items(), key=lambda item: (-item[1], str(item[0])))[0]
    named = tuple((name, s) for name, s in storages.items() if s != default)
    return FrontierPlan(
        WeightPlan(default, named),
        sum(c.size for c in chosen.values()),
        sum(c.divergence for c in chosen.values()),
    )
