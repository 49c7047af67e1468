"""What a client is told when it cannot be served: OpenAI's form of an error, and its status."""

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
"""nginx's status for it; nobody reads the answer, but it is logged and counted."""
_LOG = logging.getLogger("neo_server")
_LONGEST = 1000
"""Characters of a message, which may quote what a client sent."""
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""Options by the names that requests have for them."""
_SAID = _RENAMED | {"set do_sample=False": "set temperature to 0"}
_OPTIONS = {field.name for field in fields(GenerationOptions)}
_OPTIONS |= {"bad_words", *_RENAMED.values()}


class ApiError(Exception):
    """An answer with an error's status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        """Make it.

        Args:
            status: of HTTP.
            message: what was found, what was expected, what to do.
            param: the field of the request that is wrong.
            code: for programs, where the interface has one.
        """
        super().__init__(message if len(message) <= _LONGEST else f"{message[: _LONGEST - 1]}…")
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    @property
    def headers(self) -> dict[str, str]:
        """Those that the status calls for."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status == 503 else {}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """An error of the client's."""
    return ApiError(400, message, param=param)


def unknown_model(asked: str, served: str) -> ApiError:
    """Another model than the one that is here."""
    message = f"the model {asked!r} is not here; this server has {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(message: str) -> ApiError:
    """No room now; clients may try again."""
    return ApiError(503, message, code="overloaded")


def shutting_down() -> ApiError:
    """What was begun is not finished any more."""
    return overloaded("the server is shutting down; try again")


def too_late(seconds: float) -> ApiError:
    """It took longer than a request may."""
    return ApiError(
        504,
        f"the request took longer than the {seconds:g} s that this server gives; ask for fewer "
        "tokens or continuations, or try again when it has less to do",
        code="timeout",
    )


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; whatever is not the client's is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError) and not isinstance(error, GenerationConfigError):
        message = str(error)
        for ours, theirs in _SAID.items():
            message = message.replace(ours, theirs)
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        param = message.partition(" ")[0].partition("=")[0]  # messages begin with an option's name
        return ApiError(400, message, code=code, param=param if param in _OPTIONS else None)
    if isinstance(error, MemoryError):  # CacheLimitError and DeviceMemoryError are such
        _LOG.warning("no memory for a request: %s", error)
        return overloaded("there is no memory for this request now; try again later")
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")
