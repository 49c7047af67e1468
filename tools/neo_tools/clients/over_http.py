"""Runs `neo-serve` in another process, and sends it requests with streamed answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from time import perf_counter
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError, NeoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from neo_tools.clients.measure import Load

__all__ = ["server"]

_PATIENCE = 600.0
"""Most seconds between two parts of an answer."""


@contextmanager
def server(
    bundle: Path,
    load: Load,
    prefix_cache_bytes: int,
    *,
    threads: int | None,
    backend: str,
    device: int,
) -> Iterator[Callable[[Sequence[int], int], float]]:
    """Run a server; yield a function that sends it a request.

    Args:
        bundle: folder of the bundle.
        load: its clients and lengths are the limits of the server.
        prefix_cache_bytes: size of the prefix cache; 0: none.
        threads: threads per operator; None: one per physical core.
        backend: as for `neo_runtime.load`.
        device: index of the GPU.

    Yields:
        (token ids, number of new tokens) → seconds from the event of the first new token to the end
        of the answer.

    Raises:
        DependencyError: packages of the server are missing.
        NeoError: the server did not start; the message has its output.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"the package {error.name} is missing; install neo-onnx with its extra serve"
        ) from error
    command = [sys.executable, "-m", "neo_server.command", str(bundle), "--port", "0"]
    command += ["--max-batch-size", str(load.clients), "--max-length", str(load.length)]
    command += ["--prefix-cache-mb", str(-(-prefix_cache_bytes // 10**6))]
    command += ["--backend", backend, "--device", str(device), "--no-access-log"]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _asks(_port(process))
        finally:
            process.terminate()


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        if found := re.search(r":(\d+)/v1$", line.rstrip()):
            # A full pipe would stop the server at its next warning.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return int(found[1])
        said += line
    raise NeoError(f"the server did not start: {said.strip() or 'it printed nothing'}")


def _asks(port: int) -> Callable[[Sequence[int], int], float]:
    def ask(ids: Sequence[int], new: int) -> float:
        asked = {
            "prompt": [int(token) for token in ids],
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with closing(HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(asked))
            response = connection.getresponse()
            first = response.readline()
            begun = perf_counter()
            rest = response.read()
        if response.status != 200 or not rest.endswith(b"data: [DONE]\n\n"):
            raise NeoError(f"the server answered {response.status}: {(first + rest)[-300:]!r}")
        return perf_counter() - begun

    return ask
