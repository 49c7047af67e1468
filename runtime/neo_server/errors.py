"""Error responses: OpenAI's JSON format of an error, and its HTTP status."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from neo_runtime.errors import ContextLengthError, GenerationConfigError, RequestError
from neo_runtime.options.generation_options import GenerationOptions

__all__ = [
    "CLIENT_GONE",
    "ApiError",
    "api_error",
    "bad_request",
    "overloaded",
    "shutting_down",
    "too_late",
    "unknown_model",
]

CLIENT_GONE = 499
"""nginx's status for a client that disconnected; it is never read, but logged and counted."""
_LOG = logging.getLogger("neo_server")
_LONGEST = 1000
"""Most characters of a message, which may quote what a client sent."""
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""Options whose names differ in requests: name of the option → field of the request."""
_SAID = _RENAMED | {"set do_sample=False": "set temperature to 0"}
_OPTIONS = {field.name for field in fields(GenerationOptions)}
_OPTIONS |= {"bad_words", *_RENAMED.values()}


class ApiError(Exception):
    """An error that is returned to the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        """Make an error; a long message is shortened.

        Args:
            status: HTTP status.
            message: what was found, what was expected, what to do.
            param: the field of the request that is wrong.
            code: OpenAI's code for programs, if there is one.
        """
        super().__init__(message if len(message) <= _LONGEST else f"{message[: _LONGEST - 1]}…")
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the status requires."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status == 503 else {}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The request is invalid (400)."""
    return ApiError(400, message, param=param)


def unknown_model(asked: str, served: str) -> ApiError:
    """The request names another model than the one served (404)."""
    message = f"the model {asked!r} is not here; this server has {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(message: str) -> ApiError:
    """There is no room now; clients may try again (503)."""
    return ApiError(503, message, code="overloaded")


def shutting_down() -> ApiError:
    """The request is not finished because the server is shutting down (503)."""
    return overloaded("the server is shutting down; try again")


def too_late(seconds: float) -> ApiError:
    """The request took longer than `Limits.request_seconds` (504)."""
    return ApiError(
        504,
        f"the request took longer than the {seconds:g} s that this server gives; ask for fewer "
        "tokens or continuations, or try again when it has less to do",
        code="timeout",
    )


def api_error(error: BaseException) -> ApiError:
    """The response for an error; errors that are not the client's fault are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError) and not isinstance(error, GenerationConfigError):
        message = str(error)
        for ours, theirs in _SAID.items():
            message = message.replace(ours, theirs)
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        param = message.partition(" ")[0].partition("=")[0]  # messages begin with an option's name
        return ApiError(400, message, code=code, param=param if param in _OPTIONS else None)
    if isinstance(error, MemoryError):  # includes CacheLimitError and DeviceMemoryError
        _LOG.warning("no memory for a request: %s", error)
        return overloaded("there is no memory for this request now; try again later")
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")
