"""Requests that have not begun, and which of them begin next.

First come, first served, except that groups with fewer requests in the batch go first. So a group
of a hundred requests does not delay a group of one for longer than one of its requests takes.
"""

from __future__ import annotations

from collections import Counter, deque
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from neo_runtime.cache.prefix_cache import PrefixCache
    from neo_runtime.scheduling.request import Request

__all__ = ["WaitingQueue"]

_SWEEP = 0.05
"""Least seconds between two checks of all waiting requests for ones no longer wanted."""
_SWEEP_SHARE = 20
"""The pause is also at least this many times as long as one check, for thousands of requests."""


class WaitingQueue:
    """See the module docstring."""

    def __init__(self, budget: int, prefixes: PrefixCache | None) -> None:
        """Begin with an empty queue.

        Args:
            budget: most prompt tokens to compute between two steps of the running batch.
            prefixes: the prefix cache, if any.
        """
        self.chunk = budget if prefixes is None else prefixes.chunk
        """Most prompt tokens of a sequence per call of the model; a longer prompt is "long"."""
        self._budget, self._prefixes = budget, prefixes
        self._requests: deque[Request] = deque()
        self._next_sweep = 0.0

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: Request) -> None:
        """Add a request to the queue."""
        self._requests.append(request)

    def sweep(self, *, is_closing: bool) -> None:
        """End unwanted requests, at intervals; `next` checks each again when its turn comes."""
        started = monotonic()
        if started >= self._next_sweep or is_closing:
            for request in self._requests:
                request.end_if_unwanted(is_closing=is_closing)
            self.drop_ended()
            now = monotonic()
            self._next_sweep = now + max(_SWEEP, _SWEEP_SHARE * (now - started))

    def drop_ended(self) -> None:
        """Remove the requests that have ended."""
        self._requests = deque(one for one in self._requests if not one.has_ended)

    def next(
        self, room: int, active: Sequence[Request], prefilling: Sequence[Request]
    ) -> list[Request]:
        """Remove and return the requests that begin now: one with a long prompt, or several.

        Several requests have prompts within the budget together.

        Args:
            room: sequences that the batch has room for.
            active: requests in the batch.
            prefilling: requests whose long prompts are being computed.
        """
        new: list[Request] = []
        shares: Counter[Hashable] = Counter()
        for one in (*active, *prefilling):
            if one.group is not None and not one.has_ended:
                shares[one.group] += 1
        while self._requests and len(new) < room:
            place = self._turn(shares)
            request = self._requests[place]
            request.end_if_unwanted(is_closing=False)
            if self._prefixes is not None and not request.has_ended:
                request.look_up(self._prefixes)
            if not request.has_ended:
                if not self._fits(request, new, prefilling):
                    break
                new.append(request)
                request.begin()
                if request.group is not None:
                    shares[request.group] += 1
            del self._requests[place]
        return new

    def _turn(self, shares: Mapping[Hashable, int]) -> int:
        """Index in the queue of the next request: the first whose group has the fewest running."""
        best, least = 0, shares.get(self._requests[0].group, 0)
        if least:
            for place, request in enumerate(self._requests):
                share = shares.get(request.group, 0)
                if share < least:
                    best, least = place, share
                    if not least:
                        break
        return best

    def _fits(
        self, request: Request, new: Sequence[Request], prefilling: Sequence[Request]
    ) -> bool:
        """Whether a request may begin together with `new`, beside the `prefilling` ones."""
        others = [*new, *prefilling]
        if any(request.repeats(other) for other in others):
            return False  # at the next step it finds their blocks in the prefix cache
        if self.is_long(request):
            return not others
        if not new:
            return True
        tokens = sum(len(other.unread_prompt) for other in (*new, request))
        return tokens <= self._budget and not self.is_long(new[0])

    def is_long(self, request: Request) -> bool:
        """Whether the prompt is computed in a cache of its own."""
        return len(request.unread_prompt) > self.chunk
