"""Statistics and tables of the measurements: medians over rounds, and ratios within rounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from neo_tools.bench.spread import Spread, percentile, round_ratios, spread
from neo_tools.clients.measure import WAYS

if TYPE_CHECKING:
    from neo_tools.clients.measure import Load, Round

__all__ = ["Served", "markdown", "plain", "summary"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """Statistics of one method of serving the clients."""

    way: str
    tokens_per_second: Spread
    """New tokens per second of all clients together, over the rounds."""
    first_token: float
    """Median seconds to the first token, over the requests of all rounds."""
    first_token_p95: float
    answer: float
    """Median seconds of a whole answer."""
    answer_p95: float
    speedup: Spread | None
    """Time of the first of `WAYS` divided by that of this method, in each round; None for the first
    method."""


def summary(rounds: dict[str, list[Round]], load: Load) -> list[Served]:
    """Statistics of each method, in order."""
    base = [each.seconds for each in rounds[WAYS[0]]]
    found = []
    for way, measured in rounds.items():
        seconds = [each.seconds for each in measured]
        firsts = [value for each in measured for value in each.first_tokens]
        answers = [value for each in measured for value in each.answers]
        found.append(
            Served(
                way=way,
                tokens_per_second=spread([load.tokens / value for value in seconds]),
                first_token=percentile(firsts, 50),
                first_token_p95=percentile(firsts, 95),
                answer=percentile(answers, 50),
                answer_p95=percentile(answers, 95),
                speedup=None if way == WAYS[0] else spread(round_ratios(base, seconds)),
            )
        )
    return found


def plain(served: list[Served], load: Load, facts: dict[str, Any]) -> dict[str, Any]:
    """The results as an object for JSON."""
    return {**facts, "load": asdict(load), "served": [asdict(each) for each in served]}


def markdown(served: list[Served], load: Load, facts: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"{facts['bundle']} ({facts['precision']}) on {facts['runs_on']}, {facts['machine']}: "
        f"{load.clients} clients, {load.requests} requests each, prompts of {load.prompt} tokens"
        f"{f', the first {load.shared} the same' if load.shared else ''}, {load.new_tokens} new "
        f"tokens on average; {facts['repetitions']} rounds",
        "",
        "| | tokens/s, all clients | × | first token, s (p95) | answer, s (p95) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.way} | {each.tokens_per_second.told(1)} "
        f"| {'1' if each.speedup is None else each.speedup.told(2)} "
        f"| {each.first_token:.2f} ({each.first_token_p95:.2f}) "
        f"| {each.answer:.2f} ({each.answer_p95:.2f}) |"
        for each in served
    ]
    return "\n".join(lines) + "\n"
