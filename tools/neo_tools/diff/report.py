"""The summary for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neo_export.comparison.places import REGIONS, place_text

if TYPE_CHECKING:
    from neo_export.comparison.faults import Fault

    from neo_tools.diff.results import Continuation, Perplexity, Results

__all__ = ["GRAPHS", "fault_text", "faultless_text", "path_text", "report"]

_SHOWN_LAYERS = 48
GRAPHS = {"score": "score", "prefill": "chunked prefill", "decode": "decode"}
_PATHS = GRAPHS | {"batch": "ragged batch"}


def report(results: Results) -> str:
    """The report's lines, with a newline at the end."""
    parts = [
        _head(results),
        _logits(results),
        _perplexity(results),
        _continuations(results.continuations),
        _layers(results),
        _verdict(results),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def path_text(graph: str) -> str:
    """The name of a row in the table of logits."""
    return _PATHS[graph]


def faultless_text(results: Results) -> str:
    """The conclusion if no place has a fault."""
    if results.reference.kind == "PyTorch":
        return "every step of every layer is right"
    return "no place stands out from those before it"


def fault_text(fault: Fault) -> str:
    """One sentence about a fault."""
    graphs = "every graph" if len(fault.graphs) == len(GRAPHS) else " and ".join(fault.graphs)
    regions = {
        "everywhere": "at all positions",
        "below": "at positions below the window",
        "at": "from the position at which the window is full",
        "past": "at positions past the window",
    }
    if not math.isfinite(fault.error):
        return f"{fault.where} is not finite {regions[fault.region]}, in {graphs}"
    why = f"; it looks like {fault.kind}" if fault.kind else ""
    return (
        f"{fault.where} is off by {fault.error:.2g} (limit {fault.limit:.2g}) "
        f"{regions[fault.region]}, in {graphs}{why}"
    )


def _head(results: Results) -> list[str]:
    bundle, reference = results.bundle, results.reference
    pytorch = reference.kind == "PyTorch"
    kind = "PyTorch, eager, float32" if pytorch else f"bundle, on {reference.runs_on}"
    contexts = results.contexts
    return [
        f"bundle      {bundle.path} ({bundle.precision}, target {bundle.target}), on "
        f"{bundle.runs_on}",
        f"reference   {reference.path} ({kind})",
        f"text        {results.text}: {sum(contexts)} tokens in {len(contexts)} contexts of up to "
        f"{max(contexts)}; window {results.window_size}",
    ]


def _logits(results: Results) -> list[str]:
    lines = [
        f"{'logits':<28}{'positions':>9} {'KL mean':>9} {'KL p99':>9} {'KL max':>9} "
        f"{'top-1':>7} {'top-5':>7} {'rel. L2':>9} {'max |Δ|':>9}"
    ]
    for graph in results.graphs:
        alone = sum(other.graph == graph.graph for other in results.graphs) == 2
        if graph.region != "all" and alone:
            continue
        name = path_text(graph.graph)
        if graph.region != "all":
            name = f"  {graph.region} the window"
        lines.append(
            f"{name:<28}{graph.positions:>9} {graph.kl_mean:>9.2g} {graph.kl_p99:>9.2g} "
            f"{graph.kl_max:>9.2g} {graph.top_1:>7.2%} {graph.top_5:>7.2%} "
            f"{graph.logit_error_median:>9.2g} {graph.absolute['max']:>9.2g}"
        )
    return lines


def interval_text(found: Perplexity) -> str:
    """The interval of the perplexity's increase, as text."""
    if found.low is None or found.high is None:
        return "too few for an interval"
    return f"95 % {found.low:+.3%} to {found.high:+.3%}"


def _perplexity(results: Results) -> list[str]:
    found = results.perplexity
    return [
        f"perplexity  {found.bundle:.4f}, reference {found.reference:.4f}: {found.increase:+.3%} "
        f"({interval_text(found)}), {found.tokens} tokens"
    ]


def _continuations(found: tuple[Continuation, ...]) -> list[str]:
    if not found:
        return []
    ends = [
        f"not in {one.tokens}" if one.parted_after is None else f"after {one.parted_after}"
        for one in found
    ]
    return [f"greedy texts part from the reference's: {', '.join(ends)} tokens"]


def _layers(results: Results) -> list[str]:
    """Accumulated error of the score graph's hidden states after each layer, by region."""
    rows = [
        place
        for place in results.places
        if place.graph == "score" and place.place in ("embedding", "residual", "final_norm")
    ]
    if not rows:
        return []
    lines = [
        f"{'hidden states (score)':<28}"
        + "".join(f"{f'{region} the window':>18}" for region in REGIONS)
        + f"{'worst own step':>32}"
    ]
    keys = list(dict.fromkeys((row.layer, row.place) for row in rows))
    for layer, name in keys[:_SHOWN_LAYERS]:
        by_region = {row.region: row for row in rows if (row.layer, row.place) == (layer, name)}
        cells = "".join(
            f"{by_region[region].cumulative_median:>18.2g}" if region in by_region else f"{'–':>18}"
            for region in REGIONS
        )
        label = place_text(layer, name)
        lines.append(f"{label:<28}{cells}{_worst_step(results, layer, name):>32}")
    if len(keys) > _SHOWN_LAYERS:
        lines.append(f"… {len(keys) - _SHOWN_LAYERS} more in --json and --html")
    return lines


def _worst_step(results: Results, layer: int | None, name: str) -> str:
    """The place of this layer with the largest local error in any graph."""
    own = [
        place
        for place in results.places
        if place.layer == layer and (layer is not None or place.place == name)
    ]
    worst = max(own, key=lambda place: place.local_median)
    return f"{worst.place} {worst.local_median:.2g}"


def _verdict(results: Results) -> list[str]:
    lines = []
    for check in results.checks:
        if not check.option:
            continue
        sign = "≤" if check.at_most else "≥"
        mark = "ok  " if check.passed else "PAST"
        of = f"  ({path_text(check.graph)}, {check.positions} positions)" if check.graph else ""
        lines.append(f"{mark} {check.name:<22}{check.found:>10.4g} {sign} {check.limit:g}{of}")
    fault = results.first_fault
    if not results.localized_tokens:
        lines.append("     places inside the layers were not looked at")
    elif fault is None:
        lines.append(f"ok   {faultless_text(results)}")
    else:
        lines.append(f"FAULT {fault_text(fault)}")
    lines.append("")
    lines.append("within all limits" if results.passed else "NOT within all limits")
    return lines
