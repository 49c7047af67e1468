"""A socket, and uvicorn on it."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import os
import socket
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp

__all__ = ["bound", "run"]

_LAST_PORT = 65535
_LAST_ANSWERS = 10
"""Seconds for clients to read that the server ends."""
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"uvicorn.access": {"level": "INFO"}},
}


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
        sock = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise NeoError(
            f"{host} port {port} cannot be listened to ({error}); choose another --host or --port"
        ) from error
    return sock


def run(
    app: ASGIApp,
    sock: socket.socket,
    *,
    grace: int,
    access_log: bool,
    ready: Callable[[], None],
    stopping: Callable[[], None],
    close: Callable[[], None],
) -> None:
    """Serve until a signal; then finish what was begun, for `grace` seconds at most.

    Args:
        app: the application.
        sock: bound.
        grace: seconds.
        access_log: a line on stderr for each request.
        ready: called when requests are taken.
        stopping: called when none are taken any more.
        close: called in a thread when the grace is over: ends what is still computed, whose clients
            get an answer that says so.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            stopping()
            ending = asyncio.create_task(close_later())
            try:
                await super().shutdown(sockets)
            finally:
                ending.cancel()

    async def close_later() -> None:
        await asyncio.sleep(grace)
        await asyncio.to_thread(close)

    logging.config.dictConfig(_LOGGING)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=access_log,
        timeout_graceful_shutdown=grace + _LAST_ANSWERS,
        server_header=False,
    )
    Server(config).run([sock])
