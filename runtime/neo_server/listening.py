"""A listening socket, uvicorn on it, and graceful shutdown."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo_runtime.closable import closed_on_error
from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from starlette.types import ASGIApp

__all__ = ["Leaving", "bound", "run"]

_LAST_PORT = 65535
_LAST_ANSWERS = 10
"""Seconds for clients to read the errors that tell them that the server is shutting down."""
_BACKLOG = 512
"""Most connections that may wait to be accepted."""
_OPEN_FILES = 65536
"""Open files that the process asks for."""


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to an address. It accepts no connections before it listens.

    Args:
        host: name or address of a local interface.
        port: 0 to 65535; 0: any free port.

    Raises:
        NeoError: the port is out of range, or the address is in use, unknown, or not one of this
            machine's.
    """
    if not 0 <= port <= _LAST_PORT:  # the resolver would reduce it modulo 65536
        raise NeoError(f"port is {port}, expected 0 to {_LAST_PORT}; choose another --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with closed_on_error(socket.socket(family, kind, protocol)) as sock:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        raise NeoError(
            f"cannot listen on {host} port {port} ({error}); choose another --host or --port"
        ) from error
    return sock


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """How the server shuts down after a signal; times in seconds."""

    drain: float
    """First, requests are still accepted for this long, while /health answers 503."""
    grace: float
    """Then running requests may finish for this long."""
    announce: Callable[[], None]
    """Called first, in the signal handler: from now on, /health should answer 503."""
    stopping: Callable[[], None]
    """Called after the drain delay, just before the server stops accepting connections."""
    close: Callable[[], None]
    """Called in a thread when the grace period is over: must end the remaining requests, whose
    clients then get an error."""


def run(
    app: ASGIApp,
    sock: socket.socket,
    *,
    keep_alive: int,
    ready: Callable[[], None],
    leaving: Leaving,
) -> None:
    """Serve until a signal arrives; then shut down gracefully.

    Args:
        app: the application.
        sock: a bound socket.
        keep_alive: seconds for which an idle connection is kept open.
        ready: called once requests are accepted.
        leaving: how to shut down.
    """
    import uvicorn

    from neo_server.connections import Connection

    class Server(uvicorn.Server):
        leaves_at: float | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            leaving.announce()
            if self.leaves_at is None and leaving.drain > 0:
                self._captured_signals.append(sig)
                self.leaves_at = time.monotonic() + leaving.drain
            else:  # at once: there is no drain delay, or this is a second signal
                super().handle_exit(sig, frame)

        async def on_tick(self, counter: int) -> bool:
            is_over = self.leaves_at is not None and time.monotonic() >= self.leaves_at
            return await super().on_tick(counter) or is_over

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            leaving.stopping()
            ending = asyncio.create_task(close_later())
            try:
                await super().shutdown(sockets)
            finally:
                ending.cancel()

    async def close_later() -> None:
        await asyncio.sleep(leaving.grace)
        await asyncio.to_thread(leaving.close)

    _raise_open_files()
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=math.ceil(leaving.grace) + _LAST_ANSWERS,
        server_header=False,
        backlog=_BACKLOG,
    )
    Server(config).run([sock])


def _raise_open_files() -> None:
    """Raise the limit of open files, usually 1024, to 65536 or as far as the system allows.

    Each connection needs one.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft >= most or soft == resource.RLIM_INFINITY:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
