"""The bodies of requests: how much of them is read at once, and for how long."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from neo_server.errors import ApiError, overloaded, shutting_down

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Bodies"]

_ALL_BODIES = 16
"""So many bodies of the largest size are read at once."""
_LAST_SECONDS = 1.0
"""For bodies to arrive when the server ends."""


class Bodies:
    """Reads bodies of one event loop."""

    def __init__(self, most: int) -> None:
        """Read nothing yet; `most`: bytes of one body."""
        self._most = most
        self._held = 0
        self._open: set[asyncio.Timeout] = set()
        self._is_ending = False

    async def read(self, request: Request) -> bytearray:
        """The whole body.

        Raises:
            ApiError: it is too large, encoded, or there is no room or no time for it.
            ClientDisconnect: the client has gone.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the request's body has a Content-Encoding; send plain JSON")
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self._refuse(int(length))  # before a client is told to go on
        if self._is_ending:
            raise shutting_down()
        body, limit = bytearray(), asyncio.timeout(None)
        try:
            async with limit:
                self._open.add(limit)
                async for part in request.stream():
                    self._refuse(len(body) + len(part))
                    if self._held + len(part) > self._most * _ALL_BODIES:
                        raise overloaded("too many requests are being read; try again")
                    body += part
                    self._held += len(part)
        except TimeoutError:
            raise shutting_down() from None
        finally:
            self._open.discard(limit)
            self._held -= len(body)
        return body

    def end(self) -> None:
        """What has not arrived in a moment will not be served."""
        self._is_ending = True
        when = asyncio.get_running_loop().time() + _LAST_SECONDS
        for limit in self._open:
            limit.reschedule(when)

    def _refuse(self, size: int) -> None:
        if size > self._most:
            raise ApiError(
                413, f"the request's body has more than {self._most} bytes; ask for less"
            )
