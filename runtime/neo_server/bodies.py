"""Reading of request bodies, with limits on memory and, during shutdown, on time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from neo_server.errors import ApiError, overloaded, shutting_down

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Bodies"]

_ALL_BODIES = 16
"""The bodies being read may together have as many bytes as this many of the largest size."""
_LAST_SECONDS = 1.0
"""Seconds for bodies to arrive once the server shuts down."""


class Bodies:
    """Reads the request bodies of one event loop."""

    def __init__(self, most: int) -> None:
        """Begin with no bodies; `most`: most bytes of one body."""
        self._most = most
        self._held = 0
        self._open: set[asyncio.Timeout] = set()
        self._is_ending = False

    async def read(self, request: Request) -> bytearray:
        """Read the whole body of a request.

        Raises:
            ApiError: the body is compressed (415) or too large (413); or too many bodies are being
                read, or the server is shutting down (503).
            ClientDisconnect: the client has disconnected.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the request's body has a Content-Encoding; send it uncompressed")
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self._refuse(int(length))  # before the client gets "100 Continue"
        if self._is_ending:
            raise shutting_down()
        body, limit = bytearray(), asyncio.timeout(None)
        try:
            async with limit:
                self._open.add(limit)
                async for part in request.stream():
                    self._refuse(len(body) + len(part))
                    if self._held + len(part) > self._most * _ALL_BODIES:
                        raise overloaded("too many request bodies are being read; try again")
                    body += part
                    self._held += len(part)
        except TimeoutError:
            raise shutting_down() from None
        finally:
            self._open.discard(limit)
            self._held -= len(body)
        return body

    def end(self) -> None:
        """Refuse new bodies, and those that have not arrived in one second."""
        self._is_ending = True
        when = asyncio.get_running_loop().time() + _LAST_SECONDS
        for limit in self._open:
            limit.reschedule(when)

    def _refuse(self, size: int) -> None:
        if size > self._most:
            raise ApiError(
                413, f"the request's body has more than {self._most} bytes; send a smaller one"
            )
