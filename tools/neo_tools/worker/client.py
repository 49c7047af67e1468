"""Client of a worker: `with Worker(command, title="the bundle mini") as worker: …`."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from neo_runtime.closable import Closable
from neo_runtime.errors import DependencyError, NeoError

from neo_tools.worker.environ import worker_environ

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Command", "Worker"]

Command = Sequence[str] | Callable[[], Sequence[str]]
"""Program and arguments, or a function that returns them when the worker starts."""

_TAIL_LINES = 15


class Worker(Closable):
    """One worker process; it runs while the `with` block does.

    Args:
        command: program and arguments; a function is called when the block is entered.
        title: name of the worker in messages ("the peer openvino").
        environ: its environment variables; None: `environ.worker_environ()`.
        timeout: most seconds of one request.
        advice: what to do if it does not start, or ends early.

    Raises:
        DependencyError: (on entering the block) it does not start.
    """

    def __init__(
        self,
        command: Command,
        *,
        title: str,
        environ: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        advice: str = "check its command",
    ) -> None:
        self._command = command
        self._title = title
        self._environ = worker_environ() if environ is None else environ
        self._timeout = timeout
        self._advice = advice
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stderr: deque[str] = deque(maxlen=_TAIL_LINES)
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        command = self._command() if callable(self._command) else self._command
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=self._environ,
            )
        except OSError as error:
            raise DependencyError(
                f"{self._title} does not start: {command[0]}: {error}; {self._advice}"
            ) from error
        for target in (self._read_answers, self._read_stderr):
            reader = threading.Thread(target=target, args=(self._process,), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def close(self) -> None:
        """End the worker, by force after five seconds; further calls have no effect."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            assert process.stdin is not None
            process.stdin.write('{"op": "quit"}\n')
            process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()

    @property
    def pid(self) -> int:
        """The worker's process id.

        Raises:
            NeoError: it is not running.
        """
        return self._running().pid

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Args:
            op: the operation.
            arguments: its arguments, which JSON can represent.

        Raises:
            NeoError: the request failed, the answer took too long or is not JSON, or the worker is
                not running.
            DependencyError: the worker ended instead of answering.
        """
        process = self._running()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._ended(op) from error
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            process.kill()  # a late answer would be taken for that of the next request
            self.close()
            raise NeoError(
                f"{self._title} did not answer {op} in {self._timeout:.0f} s; "
                "choose a longer timeout or a smaller request"
            ) from None
        if line is None:
            raise self._ended(op)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise NeoError(
                f"{self._title} answered {op} with {line[:200]!r}, expected JSON; something "
                "in its process writes to stdout"
            ) from error
        if not answer.get("ok"):
            raise NeoError(f"{self._title} could not {op}: {answer.get('error')}")
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise NeoError(f"{self._title} is not running; use it inside a `with` block")
        return self._process

    def _ended(self, op: str) -> NeoError:
        process = self._running()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        for reader in self._readers:
            reader.join(timeout=5)
        tail = "\n".join(self._stderr)
        return DependencyError(
            f"{self._title} ended (status {process.returncode}) instead of answering {op}; "
            f"{self._advice}. Its last lines:\n{tail}"
        )

    def _read_answers(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _read_stderr(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._stderr.append(line.rstrip())
