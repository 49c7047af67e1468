"""`neo-bench BUNDLE`: measures a bundle on this machine, and other engines for comparison."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from neo_runtime.command.command_line import run_command
from neo_runtime.errors import RequestError
from neo_runtime.machine.cores import physical_cores

from neo_tools.bench.cases import PeerChoice, Settings, make_cases
from neo_tools.bench.cli_options import make_parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path
    from types import FrameType

__all__ = ["main"]

_TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = make_parser().parse_args(argv)
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
    """Raise an exception, so that stopped workers are woken up and ended, too."""
    raise SystemExit(_TERMINATED)


def _first_and_last_line(message: str) -> str:
    """The first and the last line of a message that ends with a worker's last lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"


def _run(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    if arguments.plot is not None:
        from neo_tools.bench.plot import check_plot

        check_plot(arguments.plot)
    # Slow imports are here, so that --help and usage errors answer at once.
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
    """Writes progress lines to stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    """The settings; raises RequestError or DependencyError for what cannot be measured."""
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
    """The numbers from all uses of an option, without duplicates."""
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
    precision = precision or spec.precisions[0]
    spec.check_precision(precision)
    python_of(name, root)
    return PeerChoice(name=name, precision=precision)


if __name__ == "__main__":
    sys.exit(main())
