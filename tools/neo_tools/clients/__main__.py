"""`python -m neo_tools.clients BUNDLE`: throughput and latency with concurrent clients."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, run_command

import neo_tools.clients
from neo_tools.arguments import add_numbers, add_running

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from neo_tools.clients.measure import Load

__all__ = ["main"]

_PROGRAM = "python -m neo_tools.clients"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(_PROGRAM, lambda: _run(arguments), extras="bench")


def _run(arguments: argparse.Namespace) -> int:
    import neo_runtime

    from neo_tools.bench.machine import machine_facts
    from neo_tools.clients.measure import Load, measure
    from neo_tools.clients.over_http import server
    from neo_tools.clients.report import markdown, plain, summary

    load = Load(
        clients=arguments.clients,
        requests=arguments.requests,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        shared=arguments.shared,
    )
    with neo_runtime.load(
        arguments.bundle,
        threads=arguments.threads,
        backend=arguments.backend,
        device=arguments.device,
    ) as model:
        _check(load, model.manifest.max_length)
        running = server(
            arguments.bundle,
            load,
            load.prefix_cache_bytes(model) if load.shared else 0,
            threads=arguments.threads,
            backend=arguments.backend,
            device=arguments.device,
        )
        with running if arguments.http else nullcontext() as over_http:
            rounds = measure(model, load, arguments.repetitions, _progress, over_http)
        facts = {
            "bundle": arguments.bundle.resolve().name,
            "precision": model.manifest.precision,
            "runs_on": model.runs_on,
            "machine": machine_facts().cpu,
            "repetitions": arguments.repetitions,
        }
    served = summary(rounds, load)
    if arguments.json:
        print(json.dumps(plain(served, load, facts), indent=2))
    else:
        sys.stdout.write(markdown(served, load, facts))
    return 0


def _check(load: Load, max_length: int) -> None:
    """Check the sizes of the requests.

    Raises:
        ContextLengthError: the longest request needs more positions than the model has.
        RequestError: prompts are not longer than the part that they share.
    """
    from neo_runtime.errors import ContextLengthError, RequestError

    if not 0 <= load.shared < load.prompt:
        raise RequestError(
            f"--shared is {load.shared}, expected 0 to {load.prompt - 1}: less than the "
            f"{load.prompt} tokens of a prompt"
        )
    if load.length > max_length:
        raise ContextLengthError(
            f"the longest request needs {load.length} positions, but the bundle has {max_length}; "
            "lower -p or -n"
        )


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=_PROGRAM,
        description=neo_tools.clients.__doc__,
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, help="a folder written by neo-export"
    )
    add_numbers(
        parser,
        ("-c", "--clients", 8, "concurrent clients"),
        ("-q", "--requests", 3, "requests of each client"),
        ("-p", "--prompt", 64, "tokens of each prompt"),
        ("-n", "--new-tokens", 32, "average new tokens of a request"),
        ("-r", "--repetitions", 3, "rounds"),
    )
    parser.add_argument(
        "-s",
        "--shared",
        type=int,
        default=0,
        metavar="N",
        help="tokens at the beginning of the prompts that are the same in a round; if above 0, a "
        "scheduler with a prefix cache is also measured (default: %(default)s)",
    )
    parser.add_argument(
        "--http", action="store_true", help="also measure neo-serve, in another process"
    )
    add_running(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
