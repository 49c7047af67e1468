"""`neo-serve BUNDLE`: a bundle behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.command.loading import add_loading_flags, loading
from neo_runtime.errors import RequestError

from neo_server.log_lines import LOG_FORMATS, configure_logging

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

Also GET /v1/models, /health, /livez, /version, and /metrics for Prometheus. {_KEYS}
(environment): keys, separated by commas, one of which clients of /v1 must send. Ctrl-C or SIGTERM
finishes what was begun; once more ends --drain-delay early, and another Ctrl-C ends at once.

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
        help="sequences computed together (default: 16 on a CPU, 32 on a GPU, fewer where memory "
        "is short)",
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
        "--max-sequences",
        type=int,
        metavar="N",
        help="continuations of one request, prompts times best_of (default: half of --max-queue)",
    )
    work.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="seconds from a request's arrival to the end of its answer; then status 504 (default: "
        "as long as it takes)",
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
    _add_operation(parser.add_argument_group("operation"))
    return parser


def _add_operation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--drain-delay",
        type=int,
        default=0,
        metavar="S",
        help="when told to stop, first take requests for so many seconds more while /health says "
        "503, so that load balancers turn away (default: %(default)s)",
    )
    group.add_argument(
        "--grace",
        type=int,
        default=20,
        metavar="S",
        help="then seconds to finish what was begun (default: %(default)s)",
    )
    group.add_argument(
        "--keep-alive",
        type=int,
        default=75,
        metavar="S",
        help="seconds that an idle connection is kept: more than a proxy in front of it keeps it "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="lines on stderr for people, or JSON objects (default: %(default)s)",
    )
    group.add_argument(
        "--no-access-log", action="store_true", help="no line on stderr for each request"
    )


def _serve(arguments: argparse.Namespace) -> int:
    import neo_runtime
    import prometheus_client
    from neo_runtime.options.values import count

    from neo_server.app import application
    from neo_server.bodies import Bodies
    from neo_server.limits import Limits
    from neo_server.listening import Leaving, bound, run
    from neo_server.service import Service

    signal.signal(signal.SIGTERM, _end)
    for flag in ("drain_delay", "grace", "keep_alive"):
        count(0)(f"--{flag.replace('_', '-')}", getattr(arguments, flag))
    # A second series for each, of no use here.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    configure_logging(form=arguments.log_format, access=not arguments.no_access_log)
    limits = Limits(
        max_batch_size=arguments.max_batch_size,
        max_length=arguments.max_length,
        max_queue=arguments.max_queue,
        max_sequences=arguments.max_sequences,
        request_seconds=arguments.request_timeout,
        prefix_cache_bytes=count(0)("--prefix-cache-mb", arguments.prefix_cache_mb) * 10**6,
    )
    bodies = Bodies(limits.max_body_bytes)
    with (
        bound(arguments.host, arguments.port) as sock,
        neo_runtime.load(arguments.bundle, **loading(arguments)) as model,
        Service(model, model.name if arguments.name is None else arguments.name, limits) as service,
    ):
        app = application(service, _keys(), bodies=bodies)
        service.start()
        host, port = sock.getsockname()[:2]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def ready() -> None:
            _say(f"{service.name} ({model.manifest.precision}, {model.runs_on}) at {where}/v1")
            _say(service.described)

        def announce() -> None:
            service.is_leaving = True

        def stopping() -> None:
            bodies.end()
            left = service.room.inside
            _say(f"stopping; sequences to finish: {left}, within {arguments.grace} s")

        try:
            run(
                app,
                sock,
                keep_alive=arguments.keep_alive,
                ready=ready,
                leaving=Leaving(
                    drain=arguments.drain_delay,
                    grace=arguments.grace,
                    announce=announce,
                    stopping=stopping,
                    close=service.close,
                ),
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
