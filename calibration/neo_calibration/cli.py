"""`neo-calibrate`: text through a checkpoint, statistics out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neo_export.statistics import StatisticsHeader

__all__ = ["main"]

_EPILOG = """\
MODEL is what neo-export takes. FILE is UTF-8 text, or JSONL with a string or an object with "text"
on each line. The text should be of the kind that the model will see.

Killed at any moment, the same command goes on from the last finished layer. Progress goes to
stderr, the summary to stdout. Exit status: 0 written, 2 bad input, 130 interrupted.
"""
_TOKENS = 16384


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neo-calibrate",
        description="Run text through a GPT-Neo checkpoint and keep statistics for quantization.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="the checkpoint")
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="text or JSONL (repeatable)",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="STATS", help="folder to write"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=_TOKENS,
        metavar="N",
        help=f"take the text's first N tokens (default: {_TOKENS})",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens a context has (default: as many as the model has positions)",
    )
    parser.add_argument(
        "--second-moments",
        choices=("full", "none"),
        default="full",
        help="keep E[x xᵀ] of each matrix's inputs, which GPTQ needs: width² floats each, 7.6 GB "
        "in all on the 1.3B shape, 0.4 GB without (default: full)",
    )
    parser.add_argument("--force", action="store_true", help="replace statistics that are there")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    progress = _Progress()
    started = time.monotonic()
    try:
        from neo_export.checkpoint import open_checkpoint
        from neo_export.hub import resolve_model
        from neo_export.memory import PeakMemory

        from neo_calibration.collect import collect
        from neo_calibration.text import read_text

        with PeakMemory() as memory, open_checkpoint(resolve_model(arguments.model)) as checkpoint:
            text = read_text(arguments.text, checkpoint, arguments.tokens, arguments.max_length)
            for warning in text.warnings:
                print(f"neo-calibrate: warning: {warning}", file=sys.stderr)
            header = collect(
                checkpoint,
                text,
                arguments.output,
                second_moments=arguments.second_moments == "full",
                force=arguments.force,
                progress=progress.show,
            )
    except NeoError as error:
        progress.end()
        print(f"neo-calibrate: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        progress.end()
        print(
            f"neo-calibrate: the package {error.name} is missing; "
            "install neo-onnx with its extras: pip install 'neo-onnx[export,torch]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        progress.end()
        print(
            "neo-calibrate: interrupted; the same command goes on from the last finished layer",
            file=sys.stderr,
        )
        return 130
    progress.end()
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


class _Progress:
    """One line a stage on stderr, with rate and what is left; rewritten in place on a terminal."""

    def __init__(self) -> None:
        self._stage = ""
        self._begun: tuple[float, int] | None = None
        self._open = False

    def show(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == "reading the model":
            if stage != self._stage:
                print(f"neo-calibrate: {stage}", file=sys.stderr)
            self._stage = stage
            return
        if self._begun is None:
            self._begun = (now, done)
            rate = ""
        else:
            since, first = self._begun
            speed = (done - first) / max(now - since, 1e-9)
            left = (total - done) / max(speed, 1e-9)
            rate = f", {speed:,.0f} positions/s a layer, {left:,.0f} s left"
        text = f"neo-calibrate: {stage}, {100 * done // total} %{rate}"
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif stage != self._stage:
            print(text, file=sys.stderr, flush=True)
        self._stage = stage

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False
