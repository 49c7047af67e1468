"""The participants of a run: a process each, of which only one computes at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from neo_runtime.errors import NeoError

from neo_tools.worker.client import Worker
from neo_tools.worker.engine_client import EngineWorker
from neo_tools.worker.environ import worker_environ

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from neo_tools.worker.engine_client import LoadResult

__all__ = ["BandwidthWorker", "Guard", "NeoWorker", "Overhead", "Participant"]


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds per token outside of onnxruntime: see `worker.NeoEngine`."""

    step: float
    """For a decode step as the rounds time it: `Model.decode_step` and the greedy choice."""
    generate: float
    """For all of `Model.generate`."""


class NeoWorker(EngineWorker):
    """A bundle's process, `worker.py`."""

    def __init__(
        self,
        label: str,
        bundle: Path,
        *,
        threads: int,
        prefill_chunk: int | None = None,
        backend: str = "auto",
        device: int = 0,
        keep_prepacked: bool = False,
        timeout: float = 3600.0,
    ) -> None:
        command = [sys.executable, "-m", "neo_tools.bench.worker", "--bundle", str(bundle)]
        command += ["--threads", str(threads), "--backend", backend, "--device", str(device)]
        if prefill_chunk is not None:
            command += ["--prefill-chunk", str(prefill_chunk)]
        if keep_prepacked:
            command += ["--keep-prepacked"]
        super().__init__(
            command, title=f"the bundle {label}", environ=worker_environ(threads), timeout=timeout
        )

    def reserve(self, batch: int, length: int) -> int:
        """Set the number of positions of the next cache; returns its bytes."""
        answer = self.ask("reserve", batch=batch, length=length)
        return int(answer["cache_bytes"])

    def score(self, length: int) -> float:
        """Run the score graph; returns the seconds."""
        return float(self.ask("score", length=length)["seconds"])

    def device_bytes(self) -> int | None:
        """GPU memory that the worker holds; None on the CPU, or if the driver does not tell."""
        found = self.ask("device_memory")["bytes"]
        return None if found is None else int(found)

    def overhead(self, batch: int, steps: int) -> Overhead | None:
        """Python's overhead per token; None on a GPU, which computes while Python runs."""
        answer = self.ask("overhead", batch=batch, steps=steps)
        if answer["step"] is None:
            return None
        return Overhead(step=answer["step"], generate=answer["generate"])

    def first_token(self, length: int) -> tuple[float, float]:
        """Seconds from `load()` to the first token, and for the same request again."""
        answer = self.ask("first_token", length=length)
        return float(answer["seconds"]), float(answer["prefill"])


class BandwidthWorker(Worker):
    """The process that measures the machine, `bandwidth.py` or `device_bandwidth.py`."""

    def __init__(
        self, *, threads: int, size: int | None, timeout: float, device: int | None = None
    ) -> None:
        command = [sys.executable, "-m", "neo_tools.bench.bandwidth", "--threads", str(threads)]
        if device is not None:
            command = [sys.executable, "-m", "neo_tools.bench.device_bandwidth"]
            command += ["--device", str(device)]
        if size is not None:
            command += ["--bytes", str(size)]
        super().__init__(command, title="the measurement of bandwidth", timeout=timeout)

    def rates(self, op: Literal["read", "peak"]) -> dict[str, float]:
        """Bytes or operations per second, by kernel."""
        rates: dict[str, float] = self.ask(op)["rates"]
        return rates


class Guard:
    """A small process that wakes the workers (SIGCONT) if this process is killed.

    A stopped worker could not notice the end of its input, and would remain with all its memory.
    """

    _CODE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
pids = [int(line) for line in sys.stdin]
for pid in pids:
    try:
        os.kill(pid, signal.SIGCONT)
    except OSError:
        pass
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self._CODE], stdin=subprocess.PIPE, text=True
        )

    def watch(self, pid: int) -> None:
        """Add a process to wake."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n")
        self._process.stdin.flush()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(kw_only=True)
class Participant:
    """A worker with its name; it is stopped (SIGSTOP) whenever it is not its turn.

    So an idle worker uses no processor time, even if its threads spin while they wait.
    """

    label: str
    kind: Literal["bundle", "peer", "machine"]
    worker: Any
    """An `EngineWorker` (for the machine a `BandwidthWorker`), or anything with its methods."""
    precision: str = ""
    """Precision of a bundle or a peer."""
    guard: Guard | None = None
    loaded: LoadResult | None = None

    @contextmanager
    def turn(self) -> Iterator[Any]:
        """Let the worker run inside the block.

        Raises:
            NeoError: the worker has ended.
        """
        self._signal("SIGCONT")
        try:
            yield self.worker
        finally:
            with suppress(NeoError):  # an exception from the block is more important
                self._signal("SIGSTOP")

    def __enter__(self) -> Participant:
        self.worker.__enter__()
        if self.guard is not None:
            self.guard.watch(self.worker.pid)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(NeoError):
            self._signal("SIGCONT")  # it must run to receive the request to end
        self.worker.close()

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)
        if number is not None:  # Windows has neither
            with suppress(ProcessLookupError):
                os.kill(self.worker.pid, number)


def rotated(items: Sequence[Participant], by: int) -> list[Participant]:
    """The order of a round: the first participant rotates, and every second round is reversed.

    So no participant always follows the same other one, which may have evicted its weights from
    memory.
    """
    start = by % max(1, len(items))
    order = [*items[start:], *items[:start]]
    return order if by % 2 == 0 else [order[0], *order[:0:-1]]
