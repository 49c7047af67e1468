"""`neo-export --calibrate-text` and `--auto`: `neo-calibrate` and the search as child processes.

Separate processes, because the export must not import the calibration (which imports PyTorch), and
because their memory is released before weights are written.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import DependencyError, StatisticsError

from neo_export.quantize.plan import WeightPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Searched", "calibration_folder", "check_search", "run_calibration", "searched"]

_MODULE = "neo_calibration"


@dataclass(frozen=True)
class Searched:
    """The result of a search."""

    plan: WeightPlan
    remembered: Path
    """Folder of matrices already quantized with these statistics, enough to export the plan."""
    summary: dict[str, Any]
    """The search's JSON summary: size, divergence and so on of the bundle that it measured."""

    def report(self) -> str:
        """The human-readable summary, one line."""
        found = self.summary
        between = ""
        if found["interval"] is not None:
            low, high = found["interval"]
            between = f"({low:.3g} to {high:.3g}) "
        return (
            f"auto        {found['divergence']:.3g} nats of KL divergence from float32 {between}"
            f"on {found['measured_on']:,} tokens; {found['bundles']} bundles were measured"
        )


@contextmanager
def calibration_folder(model: str, text: Path, options: tuple[str, ...]) -> Iterator[Path]:
    """Compute statistics on a text in a temporary folder, which is removed on exit.

    Args:
        model: what the user called it.
        text: the file to calibrate on.
        options: further options of `neo-calibrate`.

    Raises:
        DependencyError: the calibration is not installed.
        StatisticsError: the calibration failed; its own message is on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="neo-calibration-") as folder:
        yield run_calibration(model, text, Path(folder, "stats"), *options)


def run_calibration(model: str, text: Path, output: Path, *options: str) -> Path:
    """Run `neo-calibrate MODEL --text TEXT -o OUTPUT`; returns OUTPUT. Progress goes to stderr.

    Args:
        model: what the user called it.
        text: the file to calibrate on.
        output: the folder to write.
        options: further options of the command.

    Raises:
        DependencyError: the calibration is not installed.
        StatisticsError: the calibration failed; its own message is on stderr.
    """
    _require()
    _run(_MODULE, model, "--text", str(text), "-o", str(output), *options)
    return output


def check_search(model: str, text: Path, options: tuple[str, ...]) -> None:
    """Let the search check its limit and text before statistics are computed for it.

    Args:
        model: what the user called it.
        text: the file to measure on.
        options: the limit and so on, as the command takes them.

    Raises:
        DependencyError: the calibration is not installed.
        StatisticsError: the search refused them; its own message is on stderr.
    """
    _require()
    _run(f"{_MODULE}.auto", model, "--text", str(text), "--check", *options)


@contextmanager
def searched(
    model: str, text: Path, statistics: Path, options: tuple[str, ...]
) -> Iterator[Searched]:
    """Run `python -m neo_calibration.auto`, which searches for a plan within a limit.

    The search writes all its temporary files to one folder, which is removed on exit, even if the
    search is killed.

    Args:
        model: what the user called it.
        text: the file to measure on.
        statistics: folder of the model's calibration statistics.
        options: the limit and so on, as the command takes them.

    Raises:
        DependencyError: the calibration is not installed.
        StatisticsError: the search failed; its own message is on stderr.
    """
    _require()
    with tempfile.TemporaryDirectory(prefix="neo-auto-") as folder:
        plan, remembered = Path(folder, "plan.json"), Path(folder, "remembered")
        files = ("--text", str(text), "--statistics", str(statistics), "-o", str(plan))
        made = ("--remembered", str(remembered))
        said = _run(f"{_MODULE}.auto", model, *files, *made, *options, scratch=folder)
        yield Searched(WeightPlan.read(plan), remembered, _summary(said))


def _summary(said: str) -> dict[str, Any]:
    """Parse the JSON object at the end of a child's stdout; libraries may print before it."""
    try:
        # Inner objects are indented: the last line that begins with a brace starts the summary.
        found, _ = json.JSONDecoder().raw_decode(said[f"\n{said}".rindex("\n{") :])
    except ValueError as error:
        raise StatisticsError(
            f"{_MODULE}.auto printed {said[:200]!r}, expected a JSON summary; report this"
        ) from error
    summary: dict[str, Any] = found
    return summary


def _require() -> None:
    if importlib.util.find_spec(_MODULE) is None:
        raise DependencyError(
            f"calibration needs the package {_MODULE}, which is not installed; run "
            "pip install 'neo-onnx[export,torch]'",
            name=_MODULE,
        )


def _run(module: str, *arguments: str, scratch: str | None = None) -> str:
    """Run a calibration module; returns its stdout. `scratch`: its folder for temporary files."""
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | ({"TMPDIR": scratch} if scratch else {})
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        said, _ = child.communicate()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if child.returncode:
        raise StatisticsError(
            f"{module} failed (exit status {child.returncode}); see its message above"
        )
    return said
