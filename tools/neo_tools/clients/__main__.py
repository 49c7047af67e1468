"""`python -m neo_tools.clients BUNDLE`: several clients at once, in three ways to serve them."""

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
    """Run the command; its exit status."""
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
    """Raises ContextLengthError for requests that the model has no positions for.

    And RequestError for prompts that are shorter than what they share.
    """
    from neo_runtime.errors import ContextLengthError, RequestError

    if not 0 <= load.shared < load.prompt:
        raise RequestError(
            f"{load.shared} shared tokens of prompts of {load.prompt}; give --shared 0 to "
            f"{load.prompt - 1}"
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
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder with neo.json")
    add_numbers(
        parser,
        ("-c", "--clients", 8, "clients at once"),
        ("-q", "--requests", 3, "requests of each client, one after the other"),
        ("-p", "--prompt", 64, "tokens of each prompt"),
        ("-n", "--new-tokens", 32, "new tokens of a request, on average"),
        ("-r", "--repetitions", 3, "rounds"),
    )
    parser.add_argument(
        "-s",
        "--shared",
        type=int,
        default=0,
        metavar="N",
        help="tokens of each prompt with which all of a round begin; also measure a scheduler that "
        "keeps them (default: %(default)s)",
    )
    parser.add_argument(
        "--http", action="store_true", help="also measure neo-serve, in a process of its own"
    )
    add_running(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
