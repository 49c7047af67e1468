"""One self-contained HTML page: no external scripts, fonts or images."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from neo_tools.diff.page_parts import number, section, table
from neo_tools.diff.page_plots import by_layer, by_position, kl_distribution
from neo_tools.diff.report import fault_text, faultless_text, interval_text, path_text

if TYPE_CHECKING:
    from neo_tools.diff.results import Results

__all__ = ["page"]


def page(results: Results) -> str:
    """The page as HTML."""
    style = files("neo_tools.diff").joinpath("page.css").read_text(encoding="utf-8")
    name = escape(results.bundle.path.rstrip("/").rsplit("/", 1)[-1])
    body = "\n".join(
        [
            _verdict(results),
            section("Limits", _limits(results)),
            section("Logits", _logits(results)),
            by_layer(results),
            by_position(results),
            kl_distribution(results),
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


def _verdict(results: Results) -> str:
    kind = "passed" if results.passed else "failed"
    words = "Within all limits" if results.passed else "Not within all limits"
    fault = results.first_fault
    if fault is not None:
        where = f"First fault: {escape(fault_text(fault))}."
    elif results.localized_tokens:
        where = f"{faultless_text(results).capitalize()}."
    else:
        where = "Places inside the layers were not looked at."
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in results.warnings)
    listed = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    return (
        f'<div id="verdict" class="{kind}" role="status"><strong>{words}</strong>'
        f'<p id="first-fault">{where}</p></div>{listed}'
    )


def _limits(results: Results) -> str:
    return table(
        "checks",
        ("", "found", "limit", "", "what it is"),
        (
            (
                escape(check.name),
                number(check.found),
                f"{'≤' if check.at_most else '≥'} {number(check.limit)}",
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
        f"<strong>{found.increase:+.3%}</strong> ({interval_text(found)}; {found.tokens} tokens, "
        "paired bootstrap over blocks).</p>"
    )
    rows = (
        (
            escape(path_text(graph.graph))
            if graph.region == "all"
            else f'<span class="soft">{graph.region} the window</span>',
            str(graph.positions),
            number(graph.kl_mean),
            number(graph.kl_p99),
            number(graph.kl_max),
            f"{graph.top_1:.2%}",
            f"{graph.top_5:.2%}",
            number(graph.logit_error_median),
            number(graph.absolute["max"]),
            number(graph.absolute["median"]),
            number(graph.relative["median"]),
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
    return sentence + table("graphs", heads, rows)


def _tokens(results: Results) -> str:
    if not results.worst_tokens:
        return section("Most affected tokens", "<p>None: every position agrees exactly.</p>")
    items = "".join(
        f'<li><div class="soft">context {one.context}, position {one.position}: KL '
        f"{number(one.kl)}; next token by the reference <code>{_token(one.reference_best)}</code>"
        f", by the bundle <code>{_token(one.bundle_best)}</code></div>"
        f"<p>… {escape(one.before)}<mark>{_token(one.token)}</mark>{escape(one.after)} …</p></li>"
        for one in results.worst_tokens
    )
    return section("Most affected tokens", f'<ol id="worst-tokens">{items}</ol>')


def _token(text: str) -> str:
    return escape(text).replace("\n", "↵") or "∅"


def _greedy(results: Results) -> str:
    if not results.continuations:
        return ""
    rows = (
        (
            str(one.context),
            f"not in {one.tokens} tokens"
            if one.parted_after is None
            else f"{one.parted_after} tokens",
            f'<span class="text">{escape(one.bundle_text)}</span>',
            "" if one.reference_token is None else f"<code>{_token(one.reference_token)}</code>",
        )
        for one in results.continuations
    )
    heads = ("context", "parts after", "the bundle's text", "the reference goes on with")
    return section("Greedy texts", table("greedy", heads, rows))


def _details(results: Results) -> str:
    bundle, reference = results.bundle, results.reference
    rows = [
        ("bundle", f"{bundle.path} ({bundle.precision}, target {bundle.target})"),
        ("digest", bundle.digest or ""),
        ("run by", f"backend {bundle.backend}, {bundle.runs_on}"),
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
    return section(
        "Details", table("details", ("", ""), ((name, escape(text)) for name, text in rows))
    )
