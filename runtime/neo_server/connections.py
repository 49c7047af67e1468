"""HTTP/1.1 connections of uvicorn that drop clients which stop sending or reading."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

__all__ = ["Connection"]

_LOG = logging.getLogger("neo_server")
_READ_SECONDS = 60.0
"""Seconds for a request to arrive completely: enough for 4 MiB at 70 kB/s."""
_UNREAD_SECONDS = 60.0
"""Seconds for which a client may read nothing while data is waiting for it."""
_LAST_SECONDS = 5.0
"""Seconds for a client to read the remaining data once the server shuts down."""


class Connection(H11Protocol):
    """A connection that is dropped if its client stalls; uvicorn itself would wait forever."""

    _arriving: asyncio.TimerHandle | None = None
    """Runs until a request has arrived, from the start of the connection or of a later request."""
    _unread: asyncio.TimerHandle | None = None
    """Runs while the write buffer is full because the client reads too slowly."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See the base class."""
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """See the base class."""
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_awaiting()
        elif self._arriving is None:  # the next request on this connection
            self._await_request()

    def pause_writing(self) -> None:
        """See the base class: the write buffer is full."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """See the base class."""
        super().resume_writing()
        self._stop_watching()

    def timeout_keep_alive_handler(self) -> None:
        """See the base class; data that the client has not read by now is discarded."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def shutdown(self) -> None:
        """See the base class."""
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(_LAST_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """See the base class."""
        self._stop_awaiting()
        self._stop_watching()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        self._arriving = self.loop.call_later(_READ_SECONDS, self.transport.abort)

    def _watch_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(_UNREAD_SECONDS, self._drop_unless_read, left)

    def _drop_unless_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_reading()  # slow, but still reading
            return
        _LOG.warning("%s stopped reading its answer; its connection was closed", self.client)
        self.transport.abort()

    def _stop_awaiting(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
