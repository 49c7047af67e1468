"""A bundle behind OpenAI's HTTP interface for text completions: `neo-serve BUNDLE`.

    import neo_runtime, neo_server

    model = neo_runtime.load("gpt-neo-1.3b")
    app = neo_server.create_app(model)  # for any ASGI server

Its parts; each imports only itself and those above it:

errors         what a client is told
log_lines      what the operator is told
forms          the form that text must have
asked          a request's JSON, read and checked
encoding       its prompts as token ids
logprobs       log probabilities as the interface writes them
answers        completions as JSON: whole, and as events of a stream
metrics        what is counted for Prometheus
follow         a request from its first byte to its last: its id, its line in the log
bodies         the bodies of requests, read
limits         how much is taken at once
one_thread     what takes long, one piece at a time
scoring        log probabilities of prompts
work           who is let in, and one request while it is computed
service        requests that share one scheduler
streaming      events while they are computed
app            paths, keys, and who has gone
connections    clients that do not write, or do not read
listening      a socket, and uvicorn on it
command        `neo-serve`
entry          where the command begins
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
