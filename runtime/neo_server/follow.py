"""Middleware that follows each request to its end: its id, its line in the log, its metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from neo_server.answers import Usage

__all__ = ["Follow", "Followed", "followed"]

_ACCESS = logging.getLogger("neo_server.access")
_KEY = "neo_server.followed"
_HEADER = "X-Request-Id"
_USABLE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
"""Request ids that are safe in a line of the log and in a header."""
_QUIET = {"/health", "/livez", "/metrics"}
"""Polled every few seconds, so only failures are logged."""


@dataclass(eq=False, kw_only=True)
class Followed:
    """What the log and the metrics report about a request."""

    id: str
    """The client's `X-Request-Id`, or a generated one."""
    method: str
    path: str
    client: str
    status: int | None = None
    """Status of the answer; for a failed stream, that of the error in its last event. None: not yet
    known."""
    usage: Usage | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the application received the request."""
        return time.monotonic() - self.begun

    @property
    def line(self) -> str:
        """The line in the log."""
        said = f'{self.client} "{self.method} {self.path}" {self.status} {self.seconds:.3f} s'
        if self.usage is not None:
            prompt, generated = self.usage.prompt_tokens, self.usage.completion_tokens
            said += f", {prompt} + {generated} tokens"
        return f"{said}, id {self.id}"

    @property
    def facts(self) -> dict[str, object]:
        """The contents of `line` as fields, for structured logs."""
        usage = {} if self.usage is None else self.usage.json
        return {
            "request_id": self.id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 6),
            **{name: count for name, count in usage.items() if isinstance(count, int)},
        }


def followed(request: Request) -> Followed:
    """The `Followed` of a request that passed through `Follow`."""
    found: Followed = request.scope[_KEY]
    return found


class Follow:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        is_leaving: Callable[[], bool],
        done: Callable[[Followed], None],
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            is_leaving: whether to close connections, so that clients reconnect elsewhere.
            done: called once for each request, successful or not.
        """
        self._app, self._is_leaving, self._done = app, is_leaving, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        one = scope[_KEY] = _begun(scope)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                if one.status is None:
                    one.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[_HEADER] = one.id
                if self._is_leaving():
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            if one.status is None:
                one.status = 500
            self._done(one)
            if one.path not in _QUIET or one.status >= 400:
                _ACCESS.info("%s", one.line, extra={"facts": one.facts})


def _begun(scope: Scope) -> Followed:
    given = Headers(scope=scope).get(_HEADER, "")
    client = scope.get("client")
    return Followed(
        id=given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        # The raw path, still percent-encoded, cannot break the line. The query is left out, as it
        # may hold secrets.
        path=scope.get("raw_path", scope["path"].encode()).decode("latin-1"),
        client="-" if client is None else f"{client[0]}:{client[1]}",
    )
