"""One page with everything: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import math
from collections import defaultdict
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from neo_export.comparison.places import LAYER_PLACES, REGIONS

from neo_tools.diff.charts import Chart, Line, Marker, histogram, lines
from neo_tools.diff.report import GRAPHS, fault_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from neo_tools.diff.results import PlaceSummary, Results

__all__ = ["page"]

_POINTS = 256
"""Most points of the plot by position: neighbours are averaged."""


def page(results: Results) -> str:
    """HTML, complete in itself."""
    style = files("neo_tools.diff").joinpath("page.css").read_text(encoding="utf-8")
    name = escape(results.bundle.path.rstrip("/").rsplit("/", 1)[-1])
    body = "\n".join(
        [
            _verdict(results),
            _section("Limits", _limits(results)),
            _section("Logits", _logits(results)),
            _by_layer(results),
            _by_position(results),
            _kl(results),
            _tokens(results),
            _greedy(results),
            _details(results),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>neo-diff: {name}</title><style>{style}</style></head>\n"
        f"<body><main><h1>neo-diff: {name}</h1>\n{body}\n</main></body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    anchor = f"section-{title.lower().replace(' ', '-')}"
    inside = f'<h2 id="{anchor}">{title}</h2>{"".join(parts)}'
    return f'<section aria-labelledby="{anchor}">{inside}</section>'


def _table(identifier: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; the first of a row is its head."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table id="{identifier}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _verdict(results: Results) -> str:
    kind = "passed" if results.passed else "failed"
    words = "Within all limits" if results.passed else "Not within all limits"
    fault = results.first_fault
    if fault is not None:
        where = f"First fault: {escape(fault_text(fault))}."
    elif results.localized_tokens:
        where = "Every step of every layer computes what it should."
    else:
        where = "Places inside the layers were not looked at."
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in results.warnings)
    listed = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    return (
        f'<div id="verdict" class="{kind}" role="status"><strong>{words}</strong>'
        f'<p id="first-fault">{where}</p></div>{listed}'
    )


def _limits(results: Results) -> str:
    return _table(
        "checks",
        ("", "found", "limit", "", "what it is"),
        (
            (
                escape(check.name),
                _number(check.found),
                f"{'≤' if check.at_most else '≥'} {_number(check.limit)}",
                '<span class="ok">ok</span>' if check.passed else '<span class="past">past</span>',
                f'<span class="soft">{escape(check.meaning)}</span>',
            )
            for check in results.checks
        ),
    )


def _logits(results: Results) -> str:
    found = results.perplexity
    sentence = (
        f"<p>Perplexity {found.bundle:.4f}, the reference's {found.reference:.4f}: "
        f"<strong>{found.increase:+.3%}</strong> (95 % interval {found.low:+.3%} to "
        f"{found.high:+.3%}, {found.tokens} tokens, paired bootstrap over blocks).</p>"
    )
    rows = (
        (
            escape(GRAPHS[graph.graph])
            if graph.region == "all"
            else f'<span class="soft">{graph.region} the window</span>',
            str(graph.positions),
            _number(graph.kl_mean),
            _number(graph.kl_p99),
            _number(graph.kl_max),
            f"{graph.top_1:.2%}",
            f"{graph.top_5:.2%}",
            _number(graph.logit_error_median),
            _number(graph.absolute["max"]),
            _number(graph.absolute["median"]),
            _number(graph.relative["median"]),
        )
        for graph in results.graphs
    )
    heads = (
        "graph",
        "positions",
        "KL mean",
        "p99",
        "max",
        "top-1",
        "top-5",
        "relative L2",
        "max |Δ|",
        "median |Δ|",
        "median |Δ|/|ref|",
    )
    return sentence + _table("graphs", heads, rows)


def _by_layer(results: Results) -> str:
    """Two plots: what accumulates, and what each step adds by itself."""
    places = [place for place in results.places if place.graph == "score"]
    if not places:
        return ""
    layers = sorted({place.layer for place in places if place.layer is not None})
    x = [float(layer) for layer in layers]
    names = [f"{layer}{results.attention_layers[layer][0]}" for layer in layers]
    fault = results.first_fault
    markers = (
        (Marker(float(fault.layer), f"fault: {fault.place}", fault=True),)
        if fault is not None and fault.layer is not None
        else ()
    )
    accumulated = [
        Line(f"{region} the window", _of(places, layers, "residual", region, "cumulative_median"))
        for region in REGIONS
    ]
    worst = _worst_by_layer(results.places, layers)
    note = (
        "<p>Relative L2 of hidden states, median over positions. Layers are global (g) or local "
        "(l).</p>"
    )
    return _section(
        "Error by layer",
        note,
        "<h3>After each layer, accumulated from the tokens on</h3>",
        lines(
            Chart(
                "by-layer",
                "Accumulated error of the hidden state after each layer, by region",
                "layer",
                "relative L2",
                markers,
            ),
            x,
            [line for line in accumulated if any(v is not None for v in line.values)],
            names,
        ),
        "<h3>Each step by itself, from the bundle's own inputs; worst region and graph</h3>",
        lines(
            Chart(
                "by-place",
                "Error of each step of each layer, computed from the bundle's own inputs",
                "layer",
                "relative L2",
                markers,
            ),
            x,
            worst,
            names,
        ),
        _place_table(results),
    )


def _of(
    places: Sequence[PlaceSummary], layers: Sequence[int], name: str, region: str, figure: str
) -> list[float | None]:
    found = {
        place.layer: float(getattr(place, figure))
        for place in places
        if place.place == name and place.region == region
    }
    return [found.get(layer) for layer in layers]


def _worst_by_layer(places: Sequence[PlaceSummary], layers: Sequence[int]) -> list[Line]:
    worst: dict[tuple[str, int], float] = defaultdict(float)
    for place in places:
        if place.layer is not None:
            key = (place.place, place.layer)
            worst[key] = max(worst[key], _number_or_infinity(place.local_median))
    shown = [name for name in LAYER_PLACES if name != "residual"]
    return [
        Line(name.replace("_", " "), [worst.get((name, layer)) for layer in layers])
        for name in shown
        if any((name, layer) in worst for layer in layers)
    ]


def _number_or_infinity(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _place_table(results: Results) -> str:
    rows = (
        (
            f"{'' if place.layer is None else f'layer {place.layer} '}{escape(place.place)}",
            escape(place.graph),
            place.region,
            str(place.positions),
            _number(place.local_median),
            _number(place.local_max),
            _number(place.cumulative_median),
            _number(place.cumulative_max),
        )
        for place in results.places
    )
    heads = (
        "place",
        "graph",
        "region",
        "positions",
        "own step, median",
        "own step, worst",
        "accumulated, median",
        "accumulated, worst",
    )
    return (
        "<details><summary>All places, graphs and regions</summary>"
        + _table("places", heads, rows)
        + "</details>"
    )


def _by_position(results: Results) -> str:
    sums: dict[int, list[float]] = defaultdict(list)
    errors: dict[int, list[float]] = defaultdict(list)
    found = results.positions
    for position, kl, error in zip(
        found["position"], found["kl"], found["logit_error"], strict=True
    ):
        sums[position].append(kl)
        errors[position].append(error)
    positions = sorted(sums)
    stride = max(1, math.ceil(len(positions) / _POINTS))
    groups = [positions[start : start + stride] for start in range(0, len(positions), stride)]

    def means(values: dict[int, list[float]]) -> list[float | None]:
        pooled = [[v for at in group for v in values[at]] for group in groups]
        return [sum(some) / len(some) for some in pooled]

    x = [float(group[0]) for group in groups]
    window = results.window_size
    marker = (Marker(float(window), f"window {window}"),) if window <= x[-1] else ()
    return _section(
        "Error by position",
        f"<p>Mean over {len(results.contexts)} contexts"
        + (f", {stride} neighbouring positions together" if stride > 1 else "")
        + ", score graph.</p>",
        lines(
            Chart("by-position", "Error of the logits by position", "position", "", marker),
            x,
            [Line("KL divergence, nats", means(sums)), Line("logits, relative L2", means(errors))],
        ),
    )


def _kl(results: Results) -> str:
    limit = next(check.limit for check in results.checks if check.option == "--max-kl")
    return _section(
        "KL divergence",
        "<p>Positions by their KL(reference ‖ bundle), score graph; the limit is one of their "
        "mean.</p>",
        histogram(
            Chart(
                "kl-histogram",
                "How many positions have which KL divergence",
                "KL divergence, nats",
                "positions",
                (Marker(limit, "limit of the mean"),),
            ),
            results.kl_histogram["edges"],
            results.kl_histogram["counts"],
        ),
    )


def _tokens(results: Results) -> str:
    if not results.worst_tokens:
        return _section("Most affected tokens", "<p>None: every position agrees exactly.</p>")
    items = "".join(
        f'<li><div class="soft">context {one.context}, position {one.position}: KL '
        f"{_number(one.kl)}; next token by the reference <code>{_token(one.reference_best)}</code>"
        f", by the bundle <code>{_token(one.bundle_best)}</code></div>"
        f"<p>… {escape(one.before)}<mark>{_token(one.token)}</mark>{escape(one.after)} …</p></li>"
        for one in results.worst_tokens
    )
    return _section("Most affected tokens", f'<ol id="worst-tokens">{items}</ol>')


def _token(text: str) -> str:
    return escape(text).replace("\n", "↵") or "∅"


def _greedy(results: Results) -> str:
    if not results.continuations:
        return ""
    rows = (
        (
            str(one.context),
            f"never in {one.tokens}" if one.parted_after is None else f"{one.parted_after} tokens",
            f'<span class="text">{escape(one.bundle_text)}</span>',
            "" if one.reference_token is None else f"<code>{_token(one.reference_token)}</code>",
        )
        for one in results.continuations
    )
    heads = ("context", "parts after", "the bundle's text", "the reference goes on with")
    return _section("Greedy texts", _table("greedy", heads, rows))


def _details(results: Results) -> str:
    bundle, reference = results.bundle, results.reference
    rows = [
        ("bundle", f"{bundle.path} ({bundle.precision}, target {bundle.target})"),
        ("digest", bundle.digest or ""),
        ("reference", f"{reference.path} ({reference.kind}, {reference.precision})"),
        (
            "text",
            f"{results.text}: {sum(results.contexts)} tokens in {len(results.contexts)} contexts",
        ),
        ("places looked at", f"{results.localized_tokens} tokens"),
        (
            "cost",
            f"{results.seconds:.0f} s, peak memory {results.peak_rss_bytes / 1e9:.2f} GB, of it "
            f"private {results.peak_private_bytes / 1e9:.2f} GB",
        ),
        ("versions", ", ".join(f"{name} {v}" for name, v in results.versions.items())),
    ]
    return _section(
        "Details", _table("details", ("", ""), ((name, escape(text)) for name, text in rows))
    )


def _number(value: float) -> str:
    return "not finite" if not math.isfinite(value) else f"{value:.3g}"
