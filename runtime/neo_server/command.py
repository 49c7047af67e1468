"""`neo-serve BUNDLE`: serves a bundle through OpenAI's HTTP API."""

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
_EPILOG = f"""Existing clients of OpenAI's API can be used, with POST /v1/completions:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{{"prompt": "Once upon a time", "max_tokens": 20}}'

Also GET /v1/models, /health, /livez, /version, and /metrics for Prometheus. If the environment
variable {_KEYS} has keys, separated by commas, clients of /v1 must send one of them. On Ctrl-C
or SIGTERM, the server finishes running requests and ends. During --drain-delay, a second signal
ends the delay; after it, another Ctrl-C ends the server at once.

exit status: 2 wrong usage, or a bundle that cannot be served; else 128 + number of the signal"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    extras = "gpu,serve" if arguments.backend in ("cuda", "tensorrt") else "cpu,serve"
    return run_command(_PROGRAM, lambda: _serve(arguments), extras=extras)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=_PROGRAM,
        description="Serve the model of a bundle over HTTP, through OpenAI's text completions API.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder written by neo-export")
    address = parser.add_argument_group("address")
    address.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only; 0.0.0.0: all "
        "interfaces)",
    )
    address.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port (default: %(default)s; 0: any)"
    )
    address.add_argument(
        "--name", help="name of the model for clients (default: the bundle's folder name)"
    )
    work = parser.add_argument_group("limits")
    work.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help="most sequences computed together (default: 16 on a CPU, 32 on a GPU, fewer if memory "
        "is short)",
    )
    work.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its continuation together (default: the model's "
        "positions)",
    )
    work.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="most sequences computed or waiting; requests beyond them get status 503 (default: "
        "%(default)s)",
    )
    work.add_argument(
        "--max-sequences",
        type=int,
        metavar="N",
        help="most continuations of one request, prompts times best_of (default: half of "
        "--max-queue)",
    )
    work.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="most seconds from a request's arrival to the end of its answer; later ones get "
        "status 504 (default: no limit)",
    )
    work.add_argument(
        "--prefix-cache-mb",
        type=int,
        default=0,
        metavar="MB",
        help="size of the prefix cache in 10^6 bytes; prompts that begin like earlier ones compute "
        "only the rest (default: %(default)s, no prefix cache)",
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
        help="on a signal, first accept requests for so many more seconds while /health answers "
        "503, so that load balancers turn away (default: %(default)s)",
    )
    group.add_argument(
        "--grace",
        type=int,
        default=20,
        metavar="S",
        help="then finish running requests for up to so many seconds (default: %(default)s)",
    )
    group.add_argument(
        "--keep-alive",
        type=int,
        default=75,
        metavar="S",
        help="seconds for which idle connections are kept; choose more than a proxy in front "
        "keeps them (default: %(default)s)",
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="format of the log on stderr: plain text, or JSON lines (default: %(default)s)",
    )
    group.add_argument(
        "--no-access-log", action="store_true", help="do not log a line for each request"
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
    # Otherwise each counter and histogram gets a second series, with its time of creation.
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
        finally:  # uvicorn raises the signals again at the end
            _say("stopped")
    return 0


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Exit with the signal's status, but through the `with` blocks, which clean up."""
    raise SystemExit(128 + number)


def _keys() -> list[str]:
    """The API keys in the environment; empty if the variable is not set.

    Raises:
        RequestError: the variable is set but has no key. Serving without keys would then be a
            surprise.
    """
    given = os.environ.get(_KEYS)
    if given is None:
        return []
    keys = [key.strip() for key in given.split(",") if key.strip()]
    if not keys:
        raise RequestError(
            f"{_KEYS} is set but has no key; unset it, or set it to keys separated by commas"
        )
    return keys


def _say(line: str) -> None:
    print(f"{_PROGRAM}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
