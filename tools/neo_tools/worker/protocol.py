"""How a worker answers: a JSON object a line, in the order of the requests.

A request is {"op": NAME, …}; `{"op": "quit"}`, which has no answer, ends the process, as does the
end of the input. An answer has `"ok": true` and what the operation found, or `"ok": false` and
`error`. Standard library only: a worker may run in another environment than this project.
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
"""Takes a request, returns what the answer holds besides `ok`."""


def claim_stdout() -> TextIO:
    """Keep the real stdout for answers; send all that anyone else prints there to stderr.

    On the level of file descriptors, because native libraries print without asking Python. From now
    on Ctrl-C, which a terminal sends to workers too, ends this process without a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def serve(handlers: Mapping[str, Handler], requests: TextIO, answers: TextIO) -> None:
    """Answer requests until `quit` or the end of the input.

    Args:
        handlers: who answers, by operation; what one raises becomes the answer's `error`.
        requests: a JSON object a line.
        answers: written to, a JSON object a line.
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
        except Exception as error:  # a worker outlives a request that fails
            answer = _refusal(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _refusal(error: Exception) -> dict[str, Any]:
    """The answer to a request that failed; what was not expected leaves its traceback on stderr."""
    if type(error).__module__ == "neo_runtime.errors":  # by name: peers do not have that package
        return {"ok": False, "error": str(error)}
    traceback.print_exception(error, file=sys.stderr)
    return {"ok": False, "error": f"{type(error).__name__}: {error}"}
