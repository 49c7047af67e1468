"""The options of `neo-bench`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from neo_runtime.command.command_line import OneLineParser, add_version

from neo_tools.arguments import add_backend, at_least

__all__ = ["make_parser"]

_EPILOG = """LIST is numbers with commas, and the option may be repeated: -p 128,1024 -p 16. Every
combination is measured: prefill of each -p, decode of each -n at each -d, for each -b and -t.
Tests are named as in llama-bench: pp128 is prefill of 128 tokens, tg32 @ d1900 is 32 decode
steps after 1900 positions in the cache. -p 0 or -n 0 leaves a kind out.

Every bundle and peer runs in its own process. They take turns: in each of -r rounds each runs the
test once, in rotating order, while the others are stopped. A ratio is the peer's time divided by
the bundle's time in the same round; the report gives the median, smallest and largest of the
rounds.

Peers run the checkpoint --model on the same token ids, in environments that
`python -m neo_tools.peers setup PEER` makes.

  neo-bench mini-int4 -p 128 -n 32 -d 128,1900
  neo-bench mini-fp32 mini-int8 --peer torch --peer openvino:int8 --model neo-mini -o json

exit status: 0 done; 2 wrong usage, or a bundle or peer that cannot run; 130 interrupted"""


def _numbers(least: int) -> type[argparse.Action]:
    """An action that collects lists of whole numbers, each at least `least`."""

    class Collect(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: object,
            option_string: str | None = None,
        ) -> None:
            try:
                numbers = [int(part) for part in str(values).split(",")]
            except ValueError:
                parser.error(
                    f"{option_string}: {values!r} is not a list of numbers such as 128,1024"
                )
            if min(numbers) < least:
                parser.error(
                    f"{option_string}: {min(numbers)} is too small, expected at least {least}"
                )
            collected = getattr(namespace, self.dest) or []
            setattr(namespace, self.dest, [*collected, numbers])

    return Collect


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time; a number of seconds above 0")
    return number


_seconds.__name__ = "number"  # argparse uses this name in its error message


def make_parser() -> argparse.ArgumentParser:
    """The parser of `neo-bench`; importing it imports nothing heavy."""
    parser = OneLineParser(
        prog="neo-bench",
        usage="%(prog)s [options] BUNDLE [BUNDLE ...]",
        description="Measure bundles, in the manner of llama-bench.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="+", type=Path, help="folders with neo.json"
    )
    lists = (
        ("-p", "--prompt", 0, "prompt lengths (default: 128)"),
        ("-n", "--new-tokens", 0, "new tokens to decode (default: 32)"),
        ("-d", "--depth", 1, "positions in the cache before them (default: 128)"),
        ("-b", "--batch", 1, "sequences per batch (default: 1)"),
        ("-t", "--threads", 1, "threads (default: physical cores)"),
    )
    for short, long, least, text in lists:
        parser.add_argument(short, long, metavar="LIST", action=_numbers(least), help=text)
    parser.add_argument(
        "-r",
        "--repetitions",
        metavar="N",
        type=at_least(1),
        default=5,
        help="rounds of each test (default: 5)",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "csv"),
        default="md",
        help="format of the report on stdout (default: md)",
    )
    parser.add_argument(
        "--json", dest="output", action="store_const", const="json", help="as -o json"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a roofline plot, .svg")
    add_backend(
        parser,
        "what runs the bundles (default: auto); with cuda or tensorrt the limit is the GPU's "
        "memory, and the peers are torch:fp16 and torch:fp16-compiled, in this environment",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    peers = parser.add_argument_group("peers")
    peers.add_argument(
        "--peer",
        metavar="NAME[:PRECISION]",
        action="append",
        default=[],
        help="torch[:fp32|bf16], optimum[:fp32], openvino[:int8|int4|fp32]; may be repeated",
    )
    peers.add_argument("--model", metavar="CHECKPOINT", type=Path, help="checkpoint for the peers")
    peers.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="their environments (default: $NEO_PEERS, else build/peers)",
    )
    _add_details(parser.add_argument_group("details"))
    return parser


def _add_details(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed", type=int, default=1, metavar="N", help="seed of the token ids (default: 1)"
    )
    group.add_argument("--no-warmup", action="store_true", help="count the first turn too")
    group.add_argument(
        "--keep-context",
        action="store_true",
        help="let each round's decode continue the previous round instead of filling the cache "
        "again: faster with deep contexts, but round r starts (r - 1) × n positions deeper",
    )
    group.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=at_least(1),
        help="prompt tokens per call of a bundle (default: see neo_runtime.load)",
    )
    group.add_argument(
        "--keep-prepacked",
        action="store_true",
        help="store prepacked weights of float32 bundles as well (twice their size on disk)",
    )
    group.add_argument(
        "--probe-mb",
        metavar="MB",
        type=at_least(1),
        help="buffer of the bandwidth measurement in 10^6 bytes (default: 16 times the last-level "
        "cache, at least 1074, at most a quarter of the free memory)",
    )
    group.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=3600.0,
        help="seconds to wait for one answer (default: 3600)",
    )
