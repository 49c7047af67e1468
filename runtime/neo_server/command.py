"""`neo-serve BUNDLE`: a bundle behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.command.loading import add_loading_flags, loading
from neo_runtime.errors import RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["main"]

_PROGRAM = "neo-serve"
_KEYS = "NEO_API_KEYS"
_EPILOG = f"""Requests are those of OpenAI's POST /v1/completions, so its clients can be used:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{{"prompt": "Once upon a time", "max_tokens": 20}}'

Also GET /v1/models, /health, and /metrics for Prometheus. {_KEYS} (environment): keys, separated
by commas, one of which clients of /v1 must send. Ctrl-C or SIGTERM finishes what was begun.

exit status: 2 wrong usage, or a bundle that cannot be served; else that of the signal"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = _parser().parse_args(argv)
    extras = "gpu,serve" if arguments.backend in ("cuda", "tensorrt") else "cpu,serve"
    return run_command(_PROGRAM, lambda: _serve(arguments), extras=extras)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=_PROGRAM,
        description="Serve the model of a bundle over HTTP, as OpenAI's text completions.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder written by neo-export")
    address = parser.add_argument_group("address")
    address.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen to (default: %(default)s, this machine only; 0.0.0.0 for all)",
    )
    address.add_argument(
        "--port", type=int, default=8000, metavar="N", help="(default: %(default)s; 0: any)"
    )
    address.add_argument(
        "--name", help="what clients call the model (default: the bundle's folder name)"
    )
    work = parser.add_argument_group("how much at once")
    work.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help="sequences computed together (default: 16 on a CPU, 32 on a GPU)",
    )
    work.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its continuation (default: the model's positions)",
    )
    work.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="sequences computed or waiting; more get status 503 (default: %(default)s)",
    )
    work.add_argument(
        "--prefix-cache-mb",
        type=int,
        default=0,
        metavar="MB",
        help="memory in 10^6 bytes for what requests begin with; others that begin alike compute "
        "only the rest (default: %(default)s, none)",
    )
    machine = parser.add_argument_group("machine")
    add_loading_flags(machine)
    machine.add_argument(
        "--grace",
        type=int,
        default=30,
        metavar="S",
        help="seconds to finish what was begun when told to stop (default: %(default)s)",
    )
    machine.add_argument(
        "--no-access-log", action="store_true", help="no line on stderr for each request"
    )
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    import neo_runtime
    from neo_runtime.options.values import count

    from neo_server.app import application
    from neo_server.limits import Limits
    from neo_server.listening import bound, run
    from neo_server.service import Service

    signal.signal(signal.SIGTERM, _end)
    count(0)("--grace", arguments.grace)
    limits = Limits(
        max_batch_size=arguments.max_batch_size,
        max_length=arguments.max_length,
        max_queue=arguments.max_queue,
        prefix_cache_bytes=count(0)("--prefix-cache-mb", arguments.prefix_cache_mb) * 10**6,
    )
    with (
        bound(arguments.host, arguments.port) as sock,
        neo_runtime.load(arguments.bundle, **loading(arguments)) as model,
        Service(model, model.name if arguments.name is None else arguments.name, limits) as service,
    ):
        app = application(service, _keys())
        service.start()
        host, port = sock.getsockname()[:2]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def ready() -> None:
            _say(f"{service.name} ({model.manifest.precision}, {model.runs_on}) at {where}/v1")

        def stopping() -> None:
            left = service.room.inside
            _say(f"stopping; sequences to finish: {left}, within {arguments.grace} s")

        try:
            run(
                app,
                sock,
                grace=arguments.grace,
                access_log=not arguments.no_access_log,
                ready=ready,
                stopping=stopping,
                close=service.close,
            )
        finally:  # signals are raised again
            _say("stopped")
    return 0


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Leave as the signal would, but through the `with` blocks."""
    raise SystemExit(128 + number)


def _keys() -> list[str]:
    """Raises RequestError for a variable that is set and names no key: nobody is let in unasked."""
    given = os.environ.get(_KEYS)
    if given is None:
        return []
    keys = [key.strip() for key in given.split(",") if key.strip()]
    if not keys:
        raise RequestError(f"{_KEYS} is set and holds no key; unset it, or give keys")
    return keys


def _say(line: str) -> None:
    print(f"{_PROGRAM}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
