"""The options of `neo-diff`."""

from __future__ import annotations

import argparse
from pathlib import Path

from neo_export.checkpoint.model_options import add_base
from neo_runtime.command.command_line import OneLineParser, add_version

from neo_tools.arguments import add_backend, at_least, number_from

__all__ = ["make_parser"]

_EPILOG = """MODEL is the bundle's checkpoint (a Hugging Face folder, a hub id, modelscope:…), run
by PyTorch: GPT-Neo, eager, float32, one layer at a time. It may also be another bundle; then only
accumulated errors are compared.

Without --text the held-out stories that come with the package are read. FILE is what
neo-calibrate takes: plain text, or a file named .jsonl, .ndjson or .json with a document a line. It
is cut into contexts of the bundle's full length, so that positions past the attention window count.

  neo-diff mini-int4 --reference neo-mini
  neo-diff gpt-neo-1.3b-int8 --reference EleutherAI/gpt-neo-1.3B --text wiki.txt --html report.html
  neo-diff mini-int8 --reference neo-mini --json --max-kl 0.01 --min-top1 0.95
  neo-diff gpt-neo-1.3b-half --reference EleutherAI/gpt-neo-1.3B --backend cuda

exit status: 0 within all limits (or --report-only); 1 past one; 2 wrong usage or bad input"""


def _positions(text: str) -> int | None:
    if text == "all":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor `all`")
    return number


def make_parser() -> argparse.ArgumentParser:
    """The parser of `neo-diff`; importing it imports nothing heavy."""
    parser = OneLineParser(
        prog="neo-diff",
        usage="%(prog)s BUNDLE --reference MODEL [options]",
        description="Compare what a bundle computes with PyTorch, position by position and place "
        "by place, and name the first place that is wrong.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a folder with neo.json")
    parser.add_argument(
        "--reference", metavar="MODEL", required=True, help="what to compare with (see below)"
    )
    add_base(parser)
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="text to compare on (default: stories)"
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=at_least(2),
        default=4096,
        help="tokens of the text to compare (default: 4096)",
    )
    parser.add_argument(
        "--context",
        metavar="N",
        type=at_least(2),
        help="tokens per context (default: the bundle's length)",
    )
    parser.add_argument(
        "--decode-positions",
        metavar="N|all",
        type=_positions,
        default=32,
        help="positions of each context to decode token by token, a fifth each at its start, "
        "around the end of the window, around the first eviction from a local cache, at its end, "
        "and spread over the rest; the first and the last at least (default: 32)",
    )
    add_backend(
        parser,
        "what runs the bundle (default: auto, the GPU that it was exported for, else the CPU; "
        "a TensorRT bundle whose plan cannot be run is compared by its graph)",
    )
    _add_output(parser.add_argument_group("output"))
    _add_limits(
        parser.add_argument_group(
            "limits", "by default those of the bundle's precision (docs/accuracy.md)"
        )
    )
    _add_details(parser.add_argument_group("details"))
    return parser


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write all results as JSON; without FILE to stdout, instead of the summary",
    )
    group.add_argument("--html", metavar="FILE", type=Path, help="write one page with plots")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    increase = "largest increase of perplexity: bundle / reference − 1"
    median = "largest relative L2 error of the logits, median over positions"
    for option, limit, text in (
        ("--max-kl", number_from(0), "largest mean KL(reference ‖ bundle), nats"),
        ("--min-top1", number_from(0, 1), "smallest share of positions with the same best token"),
        # A negative limit requires the bundle to be better.
        ("--max-ppl-increase", number_from(-1), increase),
        ("--max-logit-error", number_from(0), median),
    ):
        group.add_argument(option, metavar="X", type=limit, help=text)
    group.add_argument("--report-only", action="store_true", help="exit with 0 even past a limit")


def _add_details(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=at_least(1),
        default=512,
        help="prompt tokens per prefill call (default: 512)",
    )
    group.add_argument(
        "--localize-tokens",
        metavar="N",
        type=at_least(0),
        default=2048,
        help="compare places inside as many contexts as fit N tokens, at least one; 0: none "
        "(default: 2048)",
    )
    group.add_argument(
        "--continuations",
        metavar="N",
        type=at_least(0),
        default=4,
        help="greedy continuations to compare (default: 4)",
    )
    group.add_argument(
        "--threads", metavar="N", type=at_least(1), help="threads (default: physical cores)"
    )
