"""What the rounds say: medians over rounds, and ratios round by round."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from neo_tools.bench.spread import Spread, round_ratios, spread
from neo_tools.drafts.measure import WITHOUT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from neo_tools.drafts.measure import Texts

__all__ = ["Checked", "Continued", "checked", "continued", "markdown", "plain"]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Scoring some tokens at once."""

    tokens: int
    milliseconds: Spread
    steps: Spread
    """Its time / that of a step of decode, round by round."""


@dataclass(frozen=True, kw_only=True)
class Continued:
    """Texts in one way."""

    way: str
    prompts: int
    tokens_per_second: Spread
    speedup: Spread
    """Time without guesses / time of this, round by round."""
    drafted: int
    accepted: int
    tokens_per_run: float
    """Tokens of the texts / runs of the large model."""
    differing: int


def checked(seconds: Mapping[int, Sequence[float]]) -> list[Checked]:
    """One entry for each number of tokens."""
    return [
        Checked(
            tokens=count,
            milliseconds=spread([1e3 * value for value in values]),
            steps=spread(round_ratios(values, seconds[1])),
        )
        for count, values in seconds.items()
    ]


def continued(texts: Mapping[str, Texts]) -> list[Continued]:
    """One entry for each way."""
    base = texts[WITHOUT].seconds
    return [
        Continued(
            way=way,
            prompts=each.prompts,
            tokens_per_second=spread([each.tokens / value for value in each.seconds]),
            speedup=spread(round_ratios(base, each.seconds)),
            drafted=each.drafted,
            accepted=each.accepted,
            tokens_per_run=each.tokens / (each.tokens - each.accepted),
            differing=each.differing,
        )
        for way, each in texts.items()
    ]


def plain(
    costs: Sequence[Checked], ways: Sequence[Continued], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """For JSON."""
    return {
        **facts,
        "checking": [asdict(each) for each in costs],
        "texts": [asdict(each) for each in ways],
    }


def markdown(costs: Sequence[Checked], ways: Sequence[Continued], facts: Mapping[str, Any]) -> str:
    """Tables for a reader."""
    lines = [
        f"{facts['bundle']} ({facts['precision']}) on {facts['runs_on']}, {facts['machine']}; "
        f"{facts['repetitions']} rounds, behind {facts['depth']} tokens",
        "",
        "| tokens at once | ms | steps of decode |",
        "|---|---|---|",
    ]
    lines += [
        f"| {each.tokens} | {each.milliseconds.median:.1f} | {each.steps.told(2)} |"
        for each in costs
    ]
    if ways:
        lines += [
            "",
            f"{ways[0].prompts} prompts, {facts['new_tokens']} new tokens each, greedy",
            "",
            "| | tokens/s | × | guesses right | tokens a run | texts that differ |",
            "|---|---|---|---|---|---|",
        ]
    lines += [
        f"| {each.way} | {each.tokens_per_second.median:.1f} | {each.speedup.told(2)} "
        f"| {each.accepted} of {each.drafted} | {each.tokens_per_run:.2f} | {each.differing} |"
        for each in ways
    ]
    return "\n".join(lines) + "\n"
