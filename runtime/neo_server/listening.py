"""A socket, and uvicorn on it."""

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
"""Seconds for clients to read that the server ends."""
_BACKLOG = 512
"""Connections that may wait to be accepted."""
_OPEN_FILES = 65536


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, and takes no connection before it is listened to.

    Raises:
        NeoError: the address is in use, or not this machine's.
    """
    if not 0 <= port <= _LAST_PORT:  # the resolver would take it modulo 65536
        raise NeoError(f"port {port} does not exist; choose --port from 0 to {_LAST_PORT}")
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
            f"{host} port {port} cannot be listened to ({error}); choose another --host or --port"
        ) from error
    return sock


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """How a server ends when it is told to; times in seconds."""

    drain: float
    """Requests are still taken, while /health says that others should be asked."""
    grace: float
    """What was begun may finish."""
    announce: Callable[[], None]
    """Called first, within a signal's handler: /health is to say so from now on."""
    stopping: Callable[[], None]
    """Called when no connections are taken any more."""
    close: Callable[[], None]
    """Called in a thread when the grace is over: ends what is still computed, whose clients get an
    answer that says so."""


def run(
    app: ASGIApp,
    sock: socket.socket,
    *,
    keep_alive: int,
    ready: Callable[[], None],
    leaving: Leaving,
) -> None:
    """Serve until a signal; then finish what was begun.

    Args:
        app: the application.
        sock: bound.
        keep_alive: seconds that an idle connection is kept.
        ready: called when requests are taken.
        leaving: how it ends.
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
            else:  # at once, also where it is told again
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
    """As many as the process may have: the usual 1024 are few for connections that wait."""
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
