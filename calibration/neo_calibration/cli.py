"""`neo-calibrate`: runs text through a checkpoint and writes statistics."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_export.checkpoint.model_options import add_base, add_tokenizer
from neo_export.reports.stages import StageLine
from neo_runtime.command.command_line import OneLineParser, add_version, run_command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from neo_export.statistics.header import StatisticsHeader

__all__ = ["main"]

_EPILOG = """\
MODEL is what neo-export takes. FILE is UTF-8 text: one document, or in a file named .jsonl, .ndjson
or .json one on each line, a string or an object with "text", "prompt" or "content". The text should
be of the kind that the model will see.

If the command is killed, running it again continues after the last finished layer. Progress goes to
stderr, the summary to stdout. Exit status: 0 written, 2 bad input, 130 interrupted.
"""
_TOKENS = 16384


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="neo-calibrate",
        description="Run text through a GPT-Neo checkpoint, and write statistics for quantization.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("model", metavar="MODEL", help="the checkpoint")
    add_base(parser)
    add_tokenizer(parser)
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="text or JSON lines (repeatable)",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="STATS", help="folder to write"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=_TOKENS,
        metavar="N",
        help=f"use the first N tokens of the text (default: {_TOKENS})",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens per context (default: all positions of the model)",
    )
    parser.add_argument(
        "--second-moments",
        choices=("full", "none"),
        default="full",
        help="full: keep E[x xᵀ] of each matrix's inputs, which GPTQ needs (neo-export --int8, "
        "--int4, --plan, --auto; not for TensorRT); the statistics of the 1.3B shape are 8.1 GB "
        "with them, 0.4 GB without (default: full)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing statistics")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(
        "neo-calibrate",
        lambda: _run(arguments),
        extras="export,torch",
        interrupted="interrupted; the same command continues after the last finished layer",
    )


def _run(arguments: argparse.Namespace) -> int:
    # Slow imports are here, so that --help and usage errors answer at once.
    from neo_export.checkpoint.folder import open_model
    from neo_export.reports.memory import PeakMemory

    from neo_calibration.collect import collect
    from neo_calibration.text import read_text

    started = time.monotonic()
    with (
        PeakMemory() as memory,
        open_model(arguments.model, arguments.base, arguments.tokenizer) as checkpoint,
        StageLine("neo-calibrate", pace="positions/s per layer") as bar,
    ):
        text = read_text(arguments.text, checkpoint, arguments.tokens, arguments.max_length)
        for warning in text.warnings:
            print(f"neo-calibrate: warning: {warning}", file=sys.stderr)
        header = collect(
            checkpoint,
            text,
            arguments.output,
            second_moments=arguments.second_moments == "full",
            force=arguments.force,
            progress=bar.show,
        )
    summary = _summary(arguments.output, header, text.warnings) | {
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": memory.rss,
        "peak_private_bytes": memory.private,
    }
    print(json.dumps(summary, indent=1) if arguments.json else _report(summary))
    return 0


def _summary(folder: Path, header: StatisticsHeader, warnings: tuple[str, ...]) -> dict[str, Any]:
    largest = max(header.places, key=lambda place: header.places[place].largest)
    scores = {name: max(heads) for name, heads in header.score_max.items()}
    top = max(scores, key=lambda name: scores[name])
    return {
        "statistics": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "tokens": header.text["tokens"],
        "contexts": header.text["contexts"],
        "places": len(header.places),
        "largest": {"place": largest, "value": header.places[largest].largest},
        "largest_score": {"layer": top, "value": scores[top]},
        "outliers": {
            name: len(place.outlier_channels)
            for name, place in header.places.items()
            if place.outlier_channels
        },
        "warnings": list(warnings),
    }


def _report(summary: dict[str, Any]) -> str:
    largest, score = summary["largest"], summary["largest_score"]
    return "\n".join(
        [
            f"statistics  {summary['statistics']}, {summary['bytes'] / 1e6:,.1f} MB",
            f"text        {summary['tokens']:,} tokens in {summary['contexts']} contexts",
            f"places      {summary['places']}, {len(summary['outliers'])} of them with outlier "
            "channels",
            f"largest     {largest['value']:.4g} at {largest['place']}; unscaled score "
            f"{score['value']:.4g} in {score['layer']}",
            f"time        {summary['seconds']:.1f} s; peak memory "
            f"{summary['peak_rss_bytes'] / 1e6:,.0f} MB, of it private "
            f"{summary['peak_private_bytes'] / 1e6:,.0f} MB",
        ]
    )
