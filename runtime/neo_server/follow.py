"""Every request from its first byte to its last: its id, its line in the log, its counts."""

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
"""What may stand in a line of the log and in a header."""
_QUIET = {"/health", "/livez", "/metrics"}
"""Asked every few seconds: only failures are logged."""


@dataclass(eq=False, kw_only=True)
class Followed:
    """What is known of a request."""

    id: str
    """The client's `X-Request-Id`, or one of our own."""
    method: str
    path: str
    client: str
    status: int | None = None
    """Of the answer; for a stream that failed, what its last event said. None: not yet known."""
    usage: Usage | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since its first byte, or so."""
        return time.monotonic() - self.begun

    @property
    def line(self) -> str:
        """For the log."""
        said = f'{self.client} "{self.method} {self.path}" {self.status} {self.seconds:.3f} s'
        if self.usage is not None:
            prompt, generated = self.usage.prompt_tokens, self.usage.completion_tokens
            said += f", {prompt} + {generated} tokens"
        return f"{said}, id {self.id}"

    @property
    def facts(self) -> dict[str, object]:
        """The same for programs."""
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
    """What is known of a request that came through `Follow`."""
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
            is_leaving: whether clients shall come back on another connection.
            done: called once for each request, whatever became of it.
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
        # As it came, so that nothing of it can break the line; without the query, which may hold
        # what is nobody's business.
        path=scope.get("raw_path", scope["path"].encode()).decode("latin-1"),
        client="-" if client is None else f"{client[0]}:{client[1]}",
    )
