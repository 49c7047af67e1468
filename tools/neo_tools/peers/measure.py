"""Runs another program, and measures its time and the memory of its processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import NeoError

from neo_tools.worker.memory import resident_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Measured", "run_measured"]

_POLL_SECONDS = 0.05
_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a finished program."""

    seconds: float
    """Wall time, including the start of the process."""
    peak_rss: int
    """Peak resident memory in bytes, summed over the program and its descendants: polled
    every 50 ms, so a lower bound."""
    peak_rss_anon: int
    """The same of anonymous memory, which is not backed by a file."""
    output: str
    """The last lines of stdout and stderr, interleaved."""


def run_measured(
    command: Sequence[str],
    *,
    what: str,
    environ: Mapping[str, str] | None = None,
    timeout: float = 3600.0,
) -> Measured:
    """Run a program, with its output on our stderr, and measure it.

    Args:
        command: program and arguments.
        what: what it does, for error messages ("export neo-mini").
        environ: its environment variables; None: ours.
        timeout: seconds after which it is killed.

    Raises:
        NeoError: it does not start, takes too long, or fails; then the message ends with its last
            lines.
    """
    started = time.perf_counter()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=None if environ is None else dict(environ),
        )
    except OSError as error:
        raise NeoError(
            f"could not {what}: {command[0]} does not start ({error}); install it"
        ) from error
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = threading.Thread(target=_forward, args=(process, tail), daemon=True)
    reader.start()
    peak_rss = peak_anon = 0
    try:
        while process.poll() is None:
            rss, anon = _tree_memory(process.pid)
            peak_rss, peak_anon = max(peak_rss, rss), max(peak_anon, anon)
            if time.perf_counter() - started > timeout:
                raise NeoError(f"could not {what} in {timeout:.0f} s; choose a longer timeout")
            time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - started
        reader.join(timeout=5)
        if process.stdout is not None:
            process.stdout.close()
    output = "\n".join(tail)
    if process.returncode:
        raise NeoError(
            f"could not {what}: `{' '.join(command)}` ended with status {process.returncode}; "
            f"its last lines:\n{output}"
        )
    return Measured(seconds=seconds, peak_rss=peak_rss, peak_rss_anon=peak_anon, output=output)


def _forward(process: subprocess.Popen[str], tail: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        tail.append(line.rstrip())
        print(f"  {line.rstrip()}", file=sys.stderr, flush=True)


def _tree_memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and its descendants; 0 for ended ones."""
    rss = anon = 0
    try:
        own = resident_of(pid)
        rss, anon = own["rss"], own["rss_anon"]
        children = [
            int(child)
            for path in Path(f"/proc/{pid}/task").glob("*/children")
            for child in path.read_text().split()
        ]
    except OSError:
        return rss, anon
    for child in children:
        more_rss, more_anon = _tree_memory(child)
        rss, anon = rss + more_rss, anon + more_anon
    return rss, anon
