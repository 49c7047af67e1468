"""Runs `neo_server` on a local port, in a thread, for real clients."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import uvicorn
from neo_server.app import application
from neo_server.connections import Connection
from neo_server.limits import Limits
from neo_server.listening import bound
from neo_server.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_runtime.model import Model

NAME = "mini"


class Served:
    """A running server."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none", **options: Any) -> Any:
        """OpenAI's client, without retries."""
        import openai

        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options
        )

    @property
    def is_idle(self) -> bool:
        """Whether no request is running or waiting."""
        return self.service.room.inside == 0

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 60
        while not self.is_idle:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert self.service.room.let_in == 0, "each leaves once"

    def ended(self, reason: str) -> float:
        """Number of sequences that finished for this reason."""
        found = re.search(
            rf'neo_sequences_total{{finish_reason="{reason}"}} (\S+)', self.get("/metrics")[1]
        )
        return float(found[1]) if found else 0

    def send(self, body: bytes | dict[str, Any], path: str = "/v1/completions") -> HTTPConnection:
        """Send a request without reading the response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, content)
        return connection

    def answer(
        self, body: bytes | dict[str, Any], path: str = "/v1/completions"
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, JSON and headers."""
        with closing(self.send(body, path)) as connection:
            response = connection.getresponse()
            return response.status, json.load(response), dict(response.headers)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()


@contextmanager
def served(
    model: Model, *, name: str = NAME, keys: tuple[str, ...] = (), **limits: Any
) -> Iterator[Served]:
    """Serve a model until the with block ends; the socket accepts connections from the start."""
    with Service(model, name, Limits(**limits)) as service:
        service.start()
        sock = bound("127.0.0.1", 0)
        config = uvicorn.Config(
            application(service, keys),
            http=Connection,
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        server = uvicorn.Server(config)
        sock.listen()  # so that clients wait until it is served
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
        thread.start()
        try:
            yield Served(service, sock.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
