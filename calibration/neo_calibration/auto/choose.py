"""The plan that keeps a limit, by measuring plans of the frontier until it is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_export.quantize.plan import WeightPlan

    from neo_calibration.auto.judge import Measured
    from neo_calibration.auto.search import Frontier, FrontierPlan

__all__ = ["Chosen", "Chooser"]

_ATTEMPTS = 6


@dataclass(frozen=True)
class Chosen:
    """A plan, and what its bundle was measured to be."""

    plan: FrontierPlan
    measured: Measured


class Chooser:
    """Measures plans of a frontier, each once."""

    def __init__(self, frontier: Frontier, measure: Callable[[WeightPlan], Measured]) -> None:
        self._plans = frontier.plans
        self._measure = measure
        self.measured: dict[int, Measured] = {}
        """By place on the frontier."""

    def at(self, index: int) -> Chosen:
        """The plan at a place of the frontier, measured."""
        if index not in self.measured:
            self.measured[index] = self._measure(self._plans[index].plan)
        return Chosen(self._plans[index], self.measured[index])

    def within_divergence(self, limit: float) -> Chosen:
        """The smallest plan found whose measured divergence is within the limit.

        Bisection between a plan that holds and one that does not; the first guesses correct the
        budget by how far the estimate was off.

        Raises:
            RequestError: not even float32 matrices keep the limit.
        """
        good, bad, budget, best = -1, len(self._plans), limit, None
        for attempt in range(2 * _ATTEMPTS):
            if bad - good <= 1 or (attempt >= _ATTEMPTS and best is not None):
                break
            guess = self._last_within(budget)
            index = guess if good < guess < bad and attempt < _ATTEMPTS else (good + bad) // 2
            found = self.at(index)
            if found.measured.divergence <= limit:
                good, best = index, found
            else:
                bad = index
            budget = limit * found.plan.divergence / max(found.measured.divergence, 1e-12)
        if best is None:
            raise RequestError(
                f"--max-kl {limit:g}: with all matrices in float32 the bundle is already at "
                f"{self.at(0).measured.divergence:.3g} nats; allow more, or export with --fp32"
            )
        return best

    def within_size(self, limit: int) -> Chosen:
        """The plan of least estimated divergence whose weight file has at most `limit` bytes.

        Raises:
            RequestError: the smallest is larger.
        """
        other = 0  # bytes of what is no matrix: known once a bundle was written
        for _ in range(_ATTEMPTS):
            fitting = (i for i, plan in enumerate(self._plans) if plan.size + other <= limit)
            index = next(fitting, len(self._plans) - 1)
            found = self.at(index)
            if found.measured.size <= limit and other:
                return found
            if index == len(self._plans) - 1 and other:
                break
            other = found.measured.size - found.plan.size
        raise RequestError(
            f"--max-size: the smallest plan has {found.measured.size:,} bytes of weights, asked "
            f"for were at most {limit:,}"
        )

    def _last_within(self, budget: float) -> int:
        return max(i for i, plan in enumerate(self._plans) if i == 0 or plan.divergence <= budget)
