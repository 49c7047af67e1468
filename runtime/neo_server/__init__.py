"""A bundle behind OpenAI's HTTP interface for text completions: `neo-serve BUNDLE`.

    import neo_runtime, neo_server

    model = neo_runtime.load("gpt-neo-1.3b")
    app = neo_server.create_app(model)  # for any ASGI server

Its parts; each imports only itself and those above it:

errors         error responses
log_lines      format of the log
forms          constrained decoding in requests: schemas, regular expressions, grammars
asked          parsing and validation of a request's JSON
encoding       token ids of a request's prompts
logprobs       log probabilities in OpenAI's format
answers        completions as JSON: whole, and as events of a stream
metrics        metrics for Prometheus
follow         middleware for each request: its id, its line in the log
bodies         reading of request bodies
limits         limits on sizes and numbers of requests
one_thread     long work, one piece at a time in one thread
scoring        log probabilities of prompts
work           admission of requests, and one request while it is computed
service        requests that share one scheduler
streaming      whole answers, and server-sent events
app            routes, API keys, and disconnected clients
connections    clients that stop sending or reading
listening      a socket, and uvicorn on it
command        `neo-serve`
entry          entry point of the command
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_server.app import create_app
    from neo_server.limits import Limits

__all__ = ["Limits", "create_app"]

_MODULES = {"Limits": "limits", "create_app": "app"}


def __getattr__(name: str) -> Any:
    """Import Starlette only when the application is asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
