"""The plan that keeps a limit, by measuring plans of the frontier until it is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from neo_export.quantize.plan import WeightPlan

    from neo_calibration.auto.judge import Measured
    from neo_calibration.auto.search import Frontier, FrontierPlan

__all__ = ["Chooser", "Chosen"]

_ATTEMPTS, _BUNDLES = 6, 12
"""Guesses from the estimate, and with halving."""
_CLOSE = 0.002
"""A plan holds, and one that is smaller by at most this share does not: good enough."""
_DOUBT = 1.3
"""How far the estimates of two plans may be off against each other."""


@dataclass(frozen=True)
class Chosen:
    """A plan, and what its bundle was measured to be."""

    plan: FrontierPlan
    measured: Measured


class Chooser:
    """Measures plans, each once.

    Plans with all matrices alike compete as well: the frontier beats them by the estimate, and the
    bundle itself decides.
    """

    def __init__(self, frontier: Frontier, measure: Callable[[FrontierPlan], Measured]) -> None:
        """Prepare; nothing is measured yet.

        Args:
            frontier: the plans.
            measure: makes a bundle of one and measures it.
        """
        self._frontier = frontier
        self._measure = measure
        self.measured: dict[WeightPlan, Chosen] = {}
        """All that was measured, in that order."""

    def of(self, plan: FrontierPlan) -> Chosen:
        """A plan, measured."""
        if plan.plan not in self.measured:
            self.measured[plan.plan] = Chosen(plan, self._measure(plan))
        return self.measured[plan.plan]

    def at(self, index: int) -> Chosen:
        """The plan at a place of the frontier, measured."""
        return self.of(self._frontier.at(index))

    def within_divergence(self, limit: float) -> Chosen:
        """The smallest plan found whose measured divergence is within the limit.

        Between a plan that holds and one that does not; the first guesses correct the budget by how
        far the estimate was off, the others halve.

        Raises:
            RequestError: not even float32 matrices keep the limit.
        """
        good, bad, budget, best = -1, len(self._frontier), limit, None
        for attempt in range(_BUNDLES):
            index = self._between(good, bad, budget if attempt < _ATTEMPTS else None)
            if index is None:
                break
            found = self.at(index)
            if found.measured.divergence <= limit:
                good, best = index, found
            else:
                bad = index
            budget = limit * found.plan.divergence / max(found.measured.divergence, 1e-12)
        best = best or self.at(0)
        if best.measured.divergence > limit:
            raise RequestError(
                f"--max-kl {limit:g}: the most exact bundle is already at "
                f"{best.measured.divergence:.3g} nats; allow more, or export with --fp32"
            )
        for plan in self._alike(_DOUBT * limit):
            if plan.size < best.plan.size and self.of(plan).measured.divergence <= limit:
                best = self.of(plan)
        return best

    def within_size(self, limit: int) -> Chosen:
        """The plan found of least measured divergence whose weight file has at most `limit` bytes.

        Raises:
            RequestError: the smallest is larger.
        """
        best = self._fitting(limit)
        other = best.measured.size - best.plan.size
        for plan in self._alike(_DOUBT * best.plan.divergence):
            if plan.size + other <= limit:
                found = self.of(plan)
                if found.measured.size <= limit:
                    best = min(best, found, key=lambda chosen: chosen.measured.divergence)
        return best

    def _between(self, good: int, bad: int, budget: float | None) -> int | None:
        """The next place to measure.

        Args:
            good: a place that holds, or -1.
            bad: a place that does not, or one past the last.
            budget: nats by the estimate to go to, as far as they lie between; None to halve.

        Returns:
            None where the two are as good as neighbours.
        """
        frontier, low, high = self._frontier, good + 1, bad - 1
        step = int(_CLOSE * (frontier.sizes[max(0, good)] + frontier.rest))
        if good >= 0:
            if bad < len(frontier) and frontier.sizes[good] - frontier.sizes[bad] <= step:
                return None
            low = max(low, frontier.first_fitting(int(frontier.sizes[good]) - step))
        if low > high:
            return high if good < high else None
        guess = (low + high) // 2 if budget is None else frontier.last_within(budget)
        return min(max(guess, low), high)

    def _fitting(self, limit: int) -> Chosen:
        """The plan of least estimated divergence that fits."""
        best: Chosen | None = None
        tried: set[int] = set()
        other = self._frontier.rest
        while len(tried) < _ATTEMPTS:
            index = self._frontier.first_fitting(limit - other)
            if index in tried:
                break
            tried.add(index)
            found = self.at(index)
            if found.measured.size <= limit and (best is None or found.plan.size > best.plan.size):
                best = found
            other = found.measured.size - found.plan.size
        if best is not None:
            return best
        smallest = self.at(len(self._frontier) - 1).measured.size
        raise RequestError(
            f"--max-size: the smallest bundle has {smallest:,} bytes of weights, asked for were at "
            f"most {limit:,}"
        )

    def _alike(self, divergence: float) -> Iterator[FrontierPlan]:
        """Plans with all matrices alike that may be at most so bad."""
        for storage in self._frontier.storages:
            plan = self._frontier.uniform(storage)
            if plan.divergence <= divergence:
                yield plan
