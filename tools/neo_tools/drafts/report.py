"""Statistics and tables of the measurements: medians over rounds, and ratios within rounds."""

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
    """Verification of several tokens at once."""

    tokens: int
    milliseconds: Spread
    steps: Spread
    """Its time divided by that of a decode step, in each round."""


@dataclass(frozen=True, kw_only=True)
class Continued:
    """Generation with one drafter, or without."""

    way: str
    prompts: int
    tokens_per_second: Spread
    speedup: Spread
    """Time without drafts divided by time with them, in each round."""
    drafted: int
    accepted: int
    tokens_per_run: float
    """New tokens divided by runs of the large model."""
    differing: int


def checked(seconds: Mapping[int, Sequence[float]]) -> list[Checked]:
    """Statistics for each number of tokens, from the seconds of each round."""
    return [
        Checked(
            tokens=count,
            milliseconds=spread([1e3 * value for value in values]),
            steps=spread(round_ratios(values, seconds[1])),
        )
        for count, values in seconds.items()
    ]


def continued(texts: Mapping[str, Texts]) -> list[Continued]:
    """Statistics for each drafter, and for generation without drafts."""
    base = texts[WITHOUT].seconds
    return [
        Continued(
            way=way,
            prompts=each.prompts,
            # The decode seconds begin after the first token of each text.
            tokens_per_second=spread(
                [(each.tokens - each.prompts) / value for value in each.seconds]
            ),
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
    """The results as an object for JSON."""
    return {
        **facts,
        "checking": [asdict(each) for each in costs],
        "texts": [asdict(each) for each in ways],
    }


def markdown(costs: Sequence[Checked], ways: Sequence[Continued], facts: Mapping[str, Any]) -> str:
    """The results as Markdown tables."""
    lines = [
        f"{facts['bundle']} ({facts['precision']}) on {facts['runs_on']}, {facts['machine']}; "
        f"{facts['repetitions']} rounds, after {facts['depth']} tokens",
        "",
        "| tokens at once | ms | decode steps |",
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
            "| | tokens/s | × | draft tokens accepted | tokens per run | texts that differ |",
            "|---|---|---|---|---|---|",
        ]
    lines += [
        f"| {each.way} | {each.tokens_per_second.median:.1f} | {each.speedup.told(2)} "
        f"| {each.accepted} of {each.drafted} | {each.tokens_per_run:.2f} | {each.differing} |"
        for each in ways
    ]
    return "\n".join(lines) + "\n"
