"""`neo-bench BUNDLE`: measure a bundle on this machine, beside other engines."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from neo_runtime.backends.choice import BACKENDS
from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.errors import RequestError
from neo_runtime.machine.cores import physical_cores

from neo_tools.arguments import at_least
from neo_tools.bench.cases import PeerChoice, Settings, make_cases

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["main"]

_TERMINATED = 143
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(
        "neo-bench",
        lambda: _terminable(arguments),
        extras="bench-gpu" if arguments.backend == "cuda" else "bench",
        wording=_first_and_last_line,
    )


def _terminable(arguments: argparse.Namespace) -> int:
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(arguments)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as an exception, so that stopped workers are woken and ended too."""
    raise SystemExit(_TERMINATED)


def _first_and_last_line(message: str) -> str:
    """A message whose tail is a worker's last lines: the first of all, and the last of those."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"


def _run(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    if arguments.plot is not None:
        from neo_tools.bench.plot import check_plot

        check_plot(arguments.plot)
    # Slow imports come only now, so that --help and wrong usage answer at once.
    from neo_tools.bench.report import write
    from neo_tools.bench.run import run

    results = run(settings, _Progress(quiet=arguments.quiet))
    for warning in results.warnings:
        print(f"neo-bench: warning: {warning}", file=sys.stderr)
    sys.stdout.write(write(results, arguments.output))
    if arguments.plot is not None:
        from neo_export.files.text_file import write_text_file

        from neo_tools.bench.plot import to_svg

        write_text_file(arguments.plot, to_svg(results))


class _Progress:
    """Lines on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises RequestError or DependencyError for what cannot be measured."""
    lists = {
        "prompts": _chosen(arguments.prompt, (128,)),
        "new_tokens": _chosen(arguments.new_tokens, (32,)),
        "depths": _chosen(arguments.depth, (128,)),
        "batches": _chosen(arguments.batch, (1,)),
        "threads": _chosen(arguments.threads, (physical_cores(),)),
    }
    if arguments.peer and arguments.model is None:
        raise RequestError("--peer runs the checkpoint itself; name its folder with --model")
    on_gpu = arguments.backend in ("cuda", "tensorrt")
    peers = tuple(_peer(text, arguments.root, on_gpu=on_gpu) for text in arguments.peer)
    megabytes = arguments.probe_mb
    return Settings(
        bundles=tuple(arguments.bundles),
        peers=tuple(dict.fromkeys(peers)),
        model=arguments.model,
        peers_root=arguments.root.absolute() if arguments.root else None,
        **lists,
        repetitions=arguments.repetitions,
        seed=arguments.seed,
        warmup=not arguments.no_warmup,
        keep_context=arguments.keep_context,
        prefill_chunk=arguments.prefill_chunk,
        keep_prepacked=arguments.keep_prepacked,
        probe_bytes=None if megabytes is None else megabytes * 10**6,
        backend=arguments.backend,
        device=arguments.device,
        timeout=arguments.timeout,
        cases=make_cases(**lists),
    )


def _chosen(given: list[list[int]] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of all uses of an option, each once."""
    if not given:
        return default
    return tuple(dict.fromkeys(number for numbers in given for number in numbers))


def _peer(text: str, root: Path | None, *, on_gpu: bool) -> PeerChoice:
    """Parse and check `NAME[:PRECISION]`.

    Raises:
        DependencyError: there is no such peer, or its environment is not set up.
        RequestError: it has no such precision.
    """
    from neo_tools.peers.environments import GPU_PRECISIONS, python_of, spec_of

    name, _, precision = text.partition(":")
    spec = spec_of(name)
    if on_gpu:
        wanted = precision or GPU_PRECISIONS[0]
        if name != "torch" or wanted not in GPU_PRECISIONS:
            raise RequestError(
                f"the peer {text} does not run on a GPU here; expected torch: and one of "
                f"{', '.join(GPU_PRECISIONS)}"
            )
        return PeerChoice(name=name, precision=wanted)
    if precision and precision not in spec.precisions:
        raise RequestError(
            f"the peer {name} has no precision {precision!r}; it has {', '.join(spec.precisions)}"
        )
    python_of(name, root)
    return PeerChoice(name=name, precision=precision or spec.precisions[0])


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
                parser.error(f"{option_string}: {min(numbers)} is too small; at least {least}")
            collected = getattr(namespace, self.dest) or []
            setattr(namespace, self.dest, [*collected, numbers])

    return Collect


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time; a number of seconds above 0")
    return number


_seconds.__name__ = "number"  # what argparse calls it in its message


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a roofline plot, .svg")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the bundles (default: auto); with cuda or tensorrt the limit is the GPU's "
        "memory, and the peers are torch:fp16 and torch:fp16-compiled, in this environment",
    )
    parser.add_argument(
        "--device", type=int, default=0, metavar="N", help="index of the GPU (default: 0)"
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


if __name__ == "__main__":
    sys.exit(main())
