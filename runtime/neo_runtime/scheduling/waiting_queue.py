"""Requests that have not begun, and which of them begin next.

In the order in which they came, but those of a group behind others whose group has fewer in the
batch: a group of a hundred does not hold up a group of one for longer than it takes one of them.
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
"""Seconds between two looks at all who wait: whether anybody still wants them."""
_SWEEP_SHARE = 20
"""And so many times as long as one look takes: for thousands who wait."""


class WaitingQueue:
    """See the module."""

    def __init__(self, budget: int, prefixes: PrefixCache | None) -> None:
        """Begin with nobody.

        Args:
            budget: tokens of prompts that may hold up a running batch at once.
            prefixes: what requests may begin with.
        """
        self.chunk = budget if prefixes is None else prefixes.chunk
        """Tokens of a prompt that are computed at once; a prompt of more is a long one."""
        self._budget, self._prefixes = budget, prefixes
        self._requests: deque[Request] = deque()
        self._next_sweep = 0.0

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: Request) -> None:
        """Let a request wait."""
        self._requests.append(request)

    def sweep(self, *, is_closing: bool) -> None:
        """End, now and then, what nobody wants; each is looked at when its turn comes as well."""
        started = monotonic()
        if started >= self._next_sweep or is_closing:
            for request in self._requests:
                request.end_if_unwanted(is_closing=is_closing)
            self.drop_ended()
            now = monotonic()
            self._next_sweep = now + max(_SWEEP, _SWEEP_SHARE * (now - started))

    def drop_ended(self) -> None:
        """Forget those that have ended."""
        self._requests = deque(one for one in self._requests if not one.has_ended)

    def next(
        self, room: int, active: Sequence[Request], prefilling: Sequence[Request]
    ) -> list[Request]:
        """Take those who begin now: at most `room`, and within the budget, or a long one.

        Args:
            room: sequences that the batch has room for.
            active: those that are in it.
            prefilling: those whose long prompts are being computed.
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
        """The place in the line of who is next: of those with the least share the first."""
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
        """Whether a request begins with some others, beside those whose prompts are computed."""
        others = [*new, *prefilling]
        if any(request.repeats(other) for other in others):
            return False  # it finds at the next step what they leave
        if self.is_long(request):
            return not others
        if not new:
            return True
        tokens = sum(len(other.unread_prompt) for other in (*new, request))
        return tokens <= self._budget and not self.is_long(new[0])

    def is_long(self, request: Request) -> bool:
        """Whether a prompt is read in a cache of its own."""
        return len(request.unread_prompt) > self.chunk
