"""A worker's protocol: requests and, in the same order, answers, one JSON object per line.

A request is {"op": NAME, …}. An answer has `"ok": true` and the results, or `"ok": false` and
`error`. `{"op": "quit"}` has no answer and ends the process, as does the end of the input. Only the
standard library is used: a worker may run in an environment without this project.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Handler", "claim_stdout", "serve"]

Handler = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes a request, and returns the fields of the answer except `ok`."""


def claim_stdout() -> TextIO:
    """Reserve stdout for answers; everything else that is printed there goes to stderr.

    The file descriptors are changed, because native libraries do not print through Python. Also,
    Ctrl-C, which a terminal sends to workers too, now ends this process without a traceback.

    Returns:
        The stream for answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def serve(handlers: Mapping[str, Handler], requests: TextIO, answers: TextIO) -> None:
    """Answer requests until `quit` or the end of the input.

    Args:
        handlers: by operation; an exception of a handler becomes the `error` of the answer.
        requests: stream with a JSON object per line.
        answers: stream for the answers.
    """
    for line in requests:
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            op = request.get("op")
            if op == "quit":
                return
            if op not in handlers:
                raise ValueError(f"unknown op {op!r}, expected one of {', '.join(handlers)}")
            answer = {"ok": True, **handlers[op](request)}
        except Exception as error:  # a failed request does not end the worker
            answer = _refusal(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _refusal(error: Exception) -> dict[str, Any]:
    """The answer to a failed request; unexpected errors also print a traceback to stderr."""
    if type(error).__module__ == "neo_runtime.errors":  # by name: peers lack the package
        return {"ok": False, "error": str(error)}
    traceback.print_exception(error, file=sys.stderr)
    return {"ok": False, "error": f"{type(error).__name__}: {error}"}
