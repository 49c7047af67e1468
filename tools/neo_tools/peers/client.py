"""Talk to a peer: `with Peer("openvino", model, precision="int8", threads=2) as peer: …`."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from neo_runtime.errors import DependencyError, NeoError, RequestError

from neo_tools.peers.environments import PEERS, python_of, spec_of, worker_environ
from neo_tools.peers.exports import ensure_export

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DecodeResult", "LoadResult", "MemoryResult", "Peer", "PrefillResult"]

_TAIL_LINES = 15
_START = Path(__file__).resolve().parent / "worker_start.py"


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """A loaded model."""

    seconds: float
    """Imports of its libraries included, start of the interpreter not."""
    versions: dict[str, str]
    details: dict[str, Any]
    """Options in force, as the worker found them."""


@dataclass(frozen=True, kw_only=True)
class PrefillResult:
    """A cache that holds a prompt."""

    seconds: float
    """From token ids to the next token known."""
    tokens: list[int]
    """[batch]: each row's greedy next token."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Greedy steps."""

    seconds: list[float]
    """[n], one per step, whatever the batch."""
    tokens: list[list[int]]
    """[n][batch]: what each step found; the first follows the prefill's."""


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Bytes of the worker's process."""

    rss: int
    """All resident."""
    rss_anon: int
    """Private: not backed by a file."""
    pss: int
    """Pages shared with other processes divided among them."""


class Peer:
    """One worker process, from `__enter__` to `__exit__`.

    Args:
        name: "torch", "optimum" or "openvino".
        model: a checkpoint's folder; exported (once) where the peer needs it.
        precision: one of the peer's; its first if None.
        threads: that the peer may compute with.
        root: where the peers live; see `environments.root_folder`.
        timeout: seconds that one request may take.
        command: another program that speaks the protocol (tests); no environment is needed then.

    Raises:
        DependencyError: (on entering) the environment is not set up, or the worker does not start.
        CheckpointError, RequestError, NeoError: (on entering) see `exports.ensure_export`.
    """

    role = "the peer"
    """What messages call it before its name."""

    def __init__(
        self,
        name: str,
        model: Path,
        *,
        precision: str | None = None,
        threads: int = 1,
        root: Path | None = None,
        timeout: float = 600.0,
        command: Sequence[str] | None = None,
    ) -> None:
        if threads < 1:
            raise RequestError(f"threads is {threads}; expected 1 or more")
        self.name = name
        self.precision = precision or (spec_of(name).precisions[0] if name in PEERS else "fp32")
        self._model = model
        self._threads = threads
        self._root = root
        self._timeout = timeout
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stderr: deque[str] = deque(maxlen=_TAIL_LINES)
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        command = self._command or self._worker_command()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=worker_environ(self._threads),
            )
        except OSError as error:
            raise DependencyError(
                f"{self.role} {self.name} does not start: {command[0]}: {error}; {self._advice()}"
            ) from error
        for target in (self._read_answers, self._read_stderr):
            reader = threading.Thread(target=target, args=(self._process,), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker; calling it again does nothing."""
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

    def load(self) -> LoadResult:
        """Load the model; everything else needs it."""
        answer = self._ask({"op": "load"})
        return LoadResult(
            seconds=answer["seconds"], versions=answer["versions"], details=answer["details"]
        )

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> PrefillResult:
        """Start over with a prompt (or a batch of equally long ones), in one call to the model."""
        rows = [list(row) if isinstance(row, Sequence) else [row] for row in ids]
        if ids and not isinstance(ids[0], Sequence):
            rows = [[token for row in rows for token in row]]
        answer = self._ask({"op": "prefill", "ids": rows})
        return PrefillResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def decode(self, n: int) -> DecodeResult:
        """Greedy steps after the last prefill, context or decode."""
        answer = self._ask({"op": "decode", "n": n})
        return DecodeResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def context(self, length: int, *, batch: int = 1, seed: int = 0) -> PrefillResult:
        """Fill the cache to a depth with `worker_protocol.context_ids`, in pieces of 256."""
        request = {"op": "context", "length": length, "batch": batch, "seed": seed}
        answer = self._ask(request)
        return PrefillResult(seconds=answer["seconds"], tokens=answer["tokens"])

    def memory(self) -> MemoryResult:
        """What the worker's process holds now."""
        answer = self._ask({"op": "memory"})
        return MemoryResult(rss=answer["rss"], rss_anon=answer["rss_anon"], pss=answer["pss"])

    def _worker_command(self) -> list[str]:
        spec = spec_of(self.name)
        python = python_of(self.name, self._root)
        folder = ensure_export(self.name, self._model, self.precision, self._root)
        options = {"--model": folder, "--precision": self.precision, "--threads": self._threads}
        pairs = [str(part) for option in options.items() for part in option]
        return [str(python), str(_START), spec.worker, *pairs]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._running()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise self._ended(request) from error
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            process.kill()  # whatever it answers later would be taken for another answer
            self.close()
            raise NeoError(
                f"{self.role} {self.name} did not answer {request['op']} in {self._timeout:.0f} s; "
                "give it a longer timeout or a smaller request"
            ) from None
        if line is None:
            raise self._ended(request)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise NeoError(
                f"{self.role} {self.name} answered {request['op']} with {line[:200]!r}, which is "
                "no JSON; something in its process writes to its standard output"
            ) from error
        if not answer.get("ok"):
            why = answer.get("error")
            raise NeoError(f"{self.role} {self.name} could not {request['op']}: {why}")
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise NeoError(f"{self.role} {self.name} is not running; use it inside a `with` block")
        return self._process

    def _ended(self, request: dict[str, Any]) -> NeoError:
        process = self._running()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        for reader in self._readers:
            reader.join(timeout=5)
        tail = "\n".join(self._stderr)
        return DependencyError(
            f"{self.role} {self.name} ended (status {process.returncode}) instead of answering "
            f"{request['op']}; {self._advice()}. Its last lines:\n{tail}"
        )

    def _advice(self) -> str:
        if self._command is not None:
            return "check its command"
        return f"run `python -m neo_tools.peers setup {self.name}` again"

    def _read_answers(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _read_stderr(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._stderr.append(line.rstrip())
