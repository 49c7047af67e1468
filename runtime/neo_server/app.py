"""The ASGI application: routes, API keys, errors as JSON, and disconnected clients."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import neo_runtime
from neo_runtime.json_input import parse_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from neo_server.asked import read_request
from neo_server.bodies import Bodies
from neo_server.errors import (
    CLIENT_GONE,
    ApiError,
    api_error,
    bad_request,
    shutting_down,
    unknown_model,
)
from neo_server.follow import Follow, followed
from neo_server.limits import Limits
from neo_server.service import Service
from neo_server.streaming import EventStream, whole_answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from neo_runtime.model import Model

    from neo_server.asked import Asked

    _Handler = Callable[[Request], Awaitable[Response]]

__all__ = ["application", "create_app"]

_Result = TypeVar("_Result")

_METRICS_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    model: Model,
    *,
    name: str | None = None,
    api_keys: Sequence[str] = (),
    limits: Limits | None = None,
) -> Starlette:
    """Make an ASGI application that serves OpenAI's text completions.

    It serves `POST /v1/completions`, `GET /v1/models`, `GET /v1/models/{name}`, `GET /health`,
    `GET /livez`, `GET /version` and `GET /metrics`. The graphs are loaded and the KV cache is
    allocated when the server starts the application (its lifespan), in the process that serves;
    the cache is freed when the lifespan ends.

    Args:
        model: must stay open while the application runs.
        name: the model's name for clients; by default the name of the bundle's folder.
        api_keys: requests to `/v1` need one of these as a bearer token; if empty, no key is needed.
        limits: limits on sizes and numbers of requests; by default those of `Limits`.

    Raises:
        RequestError: the bundle has no tokenizer, its generation_config.json cannot be honoured, or
            `name` is empty.
    """
    service = Service(model, model.name if name is None else name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    return application(service, api_keys, lifespan)


def application(
    service: Service,
    api_keys: Sequence[str],
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
    bodies: Bodies | None = None,
) -> Starlette:
    """See `create_app`; without `lifespan` the caller starts and closes the service.

    Args:
        service: computes the answers.
        api_keys: as for `create_app`.
        lifespan: starts and closes the service.
        bodies: reads request bodies; given by a caller that may have to end this early.
    """
    handlers = _Handlers(service, bodies or Bodies(service.limits.max_body_bytes))
    guarded = _guard(api_keys)
    app = Starlette(
        routes=[
            Route("/v1/completions", guarded(handlers.completions), methods=["POST"]),
            Route("/v1/models", guarded(handlers.models)),
            Route("/v1/models/{name:path}", guarded(handlers.model)),
            Route("/v1/{rest:path}", guarded(handlers.unknown), methods=["GET", "POST"]),
            Route("/health", handlers.health),
            Route("/livez", handlers.alive),
            Route("/version", handlers.version),
            Route("/metrics", handlers.metrics),
        ],
        middleware=[
            Middleware(Follow, is_leaving=lambda: service.is_leaving, done=service.answered)
        ],
        exception_handlers={ApiError: _as_json, HTTPException: _as_json},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Handlers:
    """The handler of each route."""

    def __init__(self, service: Service, bodies: Bodies) -> None:
        self._service, self._bodies = service, bodies
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        try:
            return await self._completions(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:  # the server's time to shut down is over
            return _error_response(shutting_down())
        except Exception as error:
            return _error_response(api_error(error))

    async def _completions(self, request: Request) -> Response:
        service, one = self._service, followed(request)
        service.check_started()
        body = await self._bodies.read(request)
        work = service.open(await asyncio.to_thread(_parsed, body), one)
        try:
            await _unless_gone(request, work.in_time(service.begin(work)))
            if work.asked.stream:
                return EventStream(work, one)  # calls `work.end`
            answer = await _unless_gone(request, work.in_time(whole_answer(work)))
        except BaseException:
            work.end()
            raise
        work.end()
        return Response(answer, media_type="application/json")

    async def models(self, _: Request) -> Response:
        """The list of models, which has one entry."""
        return _json_response({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """The model, if the name is right."""
        name = request.path_params["name"]
        if name != self._service.name:
            raise unknown_model(name, self._service.name)
        return _json_response(self._model)

    async def unknown(self, request: Request) -> Response:
        """404 for paths of OpenAI's API that are not served here."""
        raise ApiError(
            404,
            f"{request.method} {request.url.path} is not served: GPT-Neo continues text, with "
            "POST /v1/completions",
        )

    async def alive(self, _: Request) -> Response:
        """200 while the process answers, including while it starts or shuts down."""
        return _json_response({"status": "ok"})

    async def version(self, _: Request) -> Response:
        """The version of the package."""
        return _json_response({"version": neo_runtime.__version__})

    async def health(self, _: Request) -> Response:
        """200 while new requests are welcome; 503 before the start and while shutting down."""
        is_ready = self._service.is_ready and not self._service.is_leaving
        return _json_response({"status": "ok" if is_ready else "ending"}, 200 if is_ready else 503)

    async def metrics(self, _: Request) -> Response:
        """Metrics in Prometheus's text format."""
        return Response(self._service.metrics.text(), media_type=_METRICS_FORMAT)

    @property
    def _model(self) -> dict[str, Any]:
        return {
            "id": self._service.name,
            "object": "model",
            "created": self._created,
            "owned_by": "neo-onnx",
            "max_model_len": self._service.max_length,
        }


def _guard(api_keys: Sequence[str]) -> Callable[[_Handler], _Handler]:
    keys = [key.encode("utf-8", "surrogateescape") for key in api_keys]

    def guarded(handler: _Handler) -> _Handler:
        async def checked(request: Request) -> Response:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            is_known = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in keys]
            if keys and not (kind.lower() == "bearer" and any(is_known)):
                raise ApiError(
                    401,
                    "the API key is missing or unknown; send one that this server was given, as "
                    '"Authorization: Bearer KEY"',
                    code="invalid_api_key",
                )
            return await handler(request)

        return checked

    return guarded


def _parsed(body: bytearray) -> Asked:
    try:
        content = parse_json(body)
    except ValueError as error:
        raise bad_request(f"the request's body is not JSON: {error}") from error
    return read_request(content)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _as_json(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        allowed = error.headers or {}
        error = ApiError(error.status_code, f"{error.detail}; see POST /v1/completions")
        return _json_response(error.body, error.status, allowed)
    return _error_response(api_error(error))


def _error_response(error: ApiError) -> Response:
    return _json_response(error.body, error.status, error.headers)


def _json_response(
    content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    # ASCII only: an error may quote a client's unpaired surrogate, which UTF-8 cannot encode.
    return Response(json.dumps(content), status, headers, media_type="application/json")
