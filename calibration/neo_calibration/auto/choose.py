"""Chooses the plan that keeps a limit, by measuring plans of the frontier."""

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
"""Most measurements that are guided by the estimate, and most including bisection."""
_CLOSE = 0.002
"""The search stops when a plan keeps the limit and one smaller by at most this share does not."""
_DOUBT = 1.3
"""Factor by which the ratio of two plans' estimates may be wrong."""


@dataclass(frozen=True)
class Chosen:
    """A plan, and the measurements of its bundle."""

    plan: FrontierPlan
    measured: Measured


class Chooser:
    """Measures plans, each once.

    Uniform plans (one storage for all matrices) compete, too: by the estimate the frontier is
    better, but the measured bundle decides.
    """

    def __init__(self, frontier: Frontier, measure: Callable[[FrontierPlan], Measured]) -> None:
        """Prepare; nothing is measured yet.

        Args:
            frontier: the plans.
            measure: exports a bundle by a plan and measures it.
        """
        self._frontier = frontier
        self._measure = measure
        self.measured: dict[WeightPlan, Chosen] = {}
        """All measured plans, in the order of measurement."""

    def of(self, plan: FrontierPlan) -> Chosen:
        """A plan with its measurements."""
        if plan.plan not in self.measured:
            self.measured[plan.plan] = Chosen(plan, self._measure(plan))
        return self.measured[plan.plan]

    def at(self, index: int) -> Chosen:
        """The plan at an index of the frontier, with its measurements."""
        return self.of(self._frontier.at(index))

    def within_divergence(self, limit: float) -> Chosen:
        """The smallest plan found whose measured divergence is within the limit.

        The search narrows the range between a plan that keeps the limit and one that does not. The
        first guesses scale the budget by the error of the estimate, the others bisect.

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
                f"--max-kl is {limit:g}, but the most accurate bundle already has a divergence of "
                f"{best.measured.divergence:.3g} nats; raise --max-kl, or export with --fp32"
            )
        for plan in self._alike(_DOUBT * limit):
            if plan.size < best.plan.size and self.of(plan).measured.divergence <= limit:
                best = self.of(plan)
        return best

    def within_size(self, limit: int) -> Chosen:
        """The plan found with the least measured divergence and at most `limit` bytes of weights.

        Raises:
            RequestError: the smallest plan is larger.
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
        """The next index of the frontier to measure.

        Args:
            good: index of a plan that keeps the limit, or -1.
            bad: index of a plan that does not, or one past the last.
            budget: estimated divergence in nats to go to, if it is in between; None to bisect.

        Returns:
            None if the two plans are close enough to stop.
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
        """The plan with the least estimated divergence that fits."""
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
            f"--max-size allows {limit:,} bytes of weights, but the smallest bundle has "
            f"{smallest:,}; raise --max-size"
        )

    def _alike(self, divergence: float) -> Iterator[FrontierPlan]:
        """Uniform plans whose divergence may be at most this."""
        for storage in self._frontier.storages:
            plan = self._frontier.uniform(storage)
            if plan.divergence <= divergence:
                yield plan
