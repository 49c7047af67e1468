"""`python -m neo_calibration.auto`: find a plan within a limit; neo-export --auto runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_export.checkpoint.model_options import add_base, add_tokenizer
from neo_export.reports.stages import StageLine
from neo_runtime.command.command_line import OneLineParser, run_command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

_EPILOG = """\
Each group of matrices is quantized by itself, and its KL divergence from float32 is measured on one
part of the text; candidate plans are exported and measured on another part. Progress goes to
stderr, the summary to stdout. Exit status: 0 written; 2 bad input, or a limit that no plan meets.
"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m neo_calibration.auto",
        description="Choose the precision of each matrix by measuring.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="the checkpoint")
    add_base(parser)
    add_tokenizer(parser)
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="text or JSONL to measure on; may be repeated",
    )
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="STATS",
        help="what neo-calibrate wrote for this model, with second moments",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PLAN.json", help="plan to write")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check the limit and the text, which needs neither --statistics nor --output",
    )
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="the smallest bundle whose mean KL divergence from float32 is at most this",
    )
    limit.add_argument(
        "--max-size",
        metavar="SIZE",
        help="the most accurate bundle of at most SIZE bytes of weights; a value below 1 is a "
        "fraction of the float32 size",
    )
    parser.add_argument(
        "--keep-fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave weights whose names match this shell pattern in float32; may be repeated",
    )
    parser.add_argument(
        "--kv-cache",
        default="float",
        choices=("float", "int8"),
        help="measure bundles with this cache (default: float)",
    )
    parser.add_argument(
        "--remembered",
        type=Path,
        metavar="FOLDER",
        help="keep the quantized matrices there for the export (default: a temporary folder)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        metavar="N",
        help="positions to measure sensitivities on, and as many others to measure bundles on "
        "(default: 4096)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="write plan.json, auto.json and auto.svg there; the curve measures more bundles",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.check and None in (arguments.statistics, arguments.output):
        parser.error("the following arguments are required: --statistics, -o/--output")
    return run_command(
        "neo-auto",
        lambda: _run(arguments),
        extras="cpu,export,torch",
        interrupted="interrupted, nothing was written",
    )


def _run(arguments: argparse.Namespace) -> int:
    from neo_calibration.auto.run import AutoOptions, run_auto

    given = {
        "base": arguments.base,
        "tokenizer": arguments.tokenizer,
        "text": tuple(arguments.text),
        "keep": tuple(arguments.keep_fp32),
        "max_divergence": arguments.max_kl,
        "max_size": arguments.max_size,
        "tokens": arguments.tokens,
        "report": arguments.report,
    }
    if arguments.check:
        return _check(arguments.model, given)
    options = AutoOptions(
        statistics=arguments.statistics,
        output=arguments.output,
        kv_cache=arguments.kv_cache,
        remembered=arguments.remembered,
        **given,
    )
    with StageLine("neo-auto") as bar:
        summary = run_auto(arguments.model, options, bar.show)
    print(json.dumps(summary, indent=1))
    return 0


def _check(model: str, given: dict[str, Any]) -> int:
    from neo_export.checkpoint.folder import open_model

    from neo_calibration.auto.inputs import SearchInputs

    inputs = SearchInputs(**given)
    inputs.check()
    with open_model(model, inputs.base, inputs.tokenizer) as checkpoint:
        inputs.check_model(checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
