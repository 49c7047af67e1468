"""Results as Markdown or JSON, or in another form (`csv_report`)."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Literal

from neo_runtime.command.standard_streams import json_text

from neo_tools.bench.cases import threads_text
from neo_tools.bench.csv_report import to_csv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_tools.bench.machine import Machine
    from neo_tools.bench.results import Limits, ParticipantFacts, Ratio, Results, Row
    from neo_tools.bench.spread import Spread

__all__ = ["to_json", "to_markdown", "write"]


def write(results: Results, form: Literal["md", "json", "csv"]) -> str:
    """The whole report as text, with a newline at its end."""
    return {"md": to_markdown, "json": to_json, "csv": to_csv}[form](results)


def to_json(results: Results) -> str:
    """All results as JSON, the seconds of every round included."""
    return f"{json_text(results.to_dict(), indent=1)}\n"


def to_markdown(results: Results) -> str:
    """The results as Markdown tables."""
    parts = [
        "\n".join(f"**Warning: {warning}**  " for warning in results.warnings),
        _machine_lines(results.machine, results.limits),
        _table(_LOAD_HEAD, [_load_cells(facts) for facts in results.participants]),
        _prefill_table(results.rows),
        _decode_table(results.rows),
        _table(_MEMORY_HEAD, [_memory_cells(results, row) for row in results.rows]),
        _ratio_table(results.ratios),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine_lines(machine: Machine, limits: Sequence[Limits]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    cache = f", L3 {_size(machine.l3_bytes)}" if machine.l3_bytes else ""
    lines = [
        f"- CPU: {machine.cpu}; {machine.cores} cores{cache}; "
        f"{' '.join(machine.flags) or 'instruction sets unknown'}",
        f"- memory {_size(machine.memory_bytes)}; {machine.system}; Python {machine.python}; "
        f"{versions}",
        f"- load average before the run: {_number(machine.load_average, 2)}",
    ]
    for limit in limits:
        kernels = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in limit.read.items())
        peaks = [f"{name} {rate / 1e9:.0f}" for name, rate in limit.peak.items()]
        peak = ", ".join(peaks) or "not measured"
        lines.append(
            f"- {threads_text(limit.threads)}: best read bandwidth "
            f"{limit.bandwidth / 1e9:.1f} GB/s ({limit.kernel}; GB/s by kernel: {kernels}), "
            f"median of {len(limit.rounds)} measurements {median(limit.rounds) / 1e9:.1f}; "
            f"peak G operations/s: {peak}"
        )
    return "\n".join(lines)


_LOAD_HEAD = (
    "model",
    "precision",
    "threads",
    "first load s",
    "load s",
    "load to first token s",
    "more than prefill s",
    "weight file MB",
    "prepacked MB",
)


def _load_cells(facts: ParticipantFacts) -> list[str]:
    return [
        facts.label,
        facts.precision,
        str(facts.threads),
        _number(facts.first_load_seconds, 3),
        _number(facts.load_seconds, 3),
        _number(facts.first_token_seconds, 3),
        _number(facts.first_token_excess_seconds, 3),
        _megabytes(facts.weights_bytes),
        _megabytes(facts.prepacked_bytes),
    ]


_CASE_HEAD = ("model", "precision", "threads", "batch", "test")


def _case_cells(row: Row) -> list[str]:
    return [row.label, row.precision, str(row.threads), str(row.batch), row.test]


def _prefill_table(rows: Sequence[Row]) -> str:
    head = (*_CASE_HEAD, "tok/s", "min – max", "first token ms")
    cells = [
        [*_case_cells(row), *_rate_cells(row), _milliseconds(row.first_token_seconds)]
        for row in rows
        if row.prompt
    ]
    return _table(head, cells)


def _decode_table(rows: Sequence[Row]) -> str:
    head = (
        *_CASE_HEAD,
        "tok/s",
        "min – max",
        "p50 ms",
        "p99 ms",
        "MB read/token",
        "GB/s",
        "of the limit",
        "of the readings beside it",
        "Python ms",
        "generate() ms",
    )
    cells = [
        [
            *_case_cells(row),
            *_rate_cells(row),
            _milliseconds(row.token_p50_seconds),
            _milliseconds(row.token_p99_seconds),
            _megabytes(row.bytes_per_token) + ("*" if row.bytes_are_nominal else ""),
            _number(None if row.read_rate is None else row.read_rate / 1e9, 2),
            "–" if row.limit_share is None else f"{row.limit_share:.0%}",
            _share_text(row.round_limit_share),
            _milliseconds(row.python_seconds, 3),
            _milliseconds(row.generate_python_seconds, 3),
        ]
        for row in rows
        if row.new_tokens
    ]
    note = "\\* nominal: what the precision needs at least, not counted in the peer's graph."
    has_nominal = any(row.bytes_are_nominal for row in rows if row.new_tokens)
    return _table(head, cells) + (f"\n\n{note}" if has_nominal else "")


def _share_text(share: Spread | None) -> str:
    return "–" if share is None else f"{share.median:.0%} ({share.min:.0%} – {share.max:.0%})"


_MEMORY_HEAD = (
    *_CASE_HEAD,
    "private MB",
    "proportional MB",
    "device MB",
    "cache MB",
    "÷ (weights + cache)",
)


def _memory_cells(results: Results, row: Row) -> list[str]:
    sizes = (row.private_bytes, row.proportional_bytes, row.device_bytes, row.cache_bytes)
    facts = results.facts_of(row)
    on_gpu = facts.details.get("backend") in ("cuda", "tensorrt")
    held, share = row.device_bytes if on_gpu else row.proportional_bytes, "–"
    if facts.weights_bytes is not None and row.cache_bytes is not None and held is not None:
        share = f"{held / (facts.weights_bytes + row.cache_bytes):.2f}"
    return [*_case_cells(row), *(_megabytes(size) for size in sizes), share]


def _ratio_table(ratios: Sequence[Ratio]) -> str:
    head = ("threads", "batch", "test", "time of", "÷ time of", "median", "min – max", "rounds")
    return _table(
        head,
        [
            [
                str(ratio.threads),
                str(ratio.batch),
                ratio.test,
                ratio.other,
                ratio.bundle,
                f"{ratio.spread.median:.2f}×",
                f"{ratio.spread.min:.2f} – {ratio.spread.max:.2f}",
                str(len(ratio.rounds)),
            ]
            for ratio in ratios
        ],
    )


def _rate_cells(row: Row) -> list[str]:
    rate = row.tokens_per_second
    return [f"{rate.median:.2f}", f"{rate.min:.2f} – {rate.max:.2f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable as plain text, too; "" without rows."""
    if not rows:
        return ""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in escaped
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _milliseconds(seconds: float | None, digits: int = 2) -> str:
    return _number(None if seconds is None else 1000 * seconds, digits)


def _megabytes(size: float | None) -> str:
    return _number(None if size is None else size / 1e6, 1)


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"
