"""`neo-export --calibrate-text` and `--auto`: `neo-calibrate` and the search as child processes.

A process of its own, because the export knows nothing of the calibration (which imports PyTorch),
and its memory is given back before weights are written.
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
    """What a search found."""

    plan: WeightPlan
    remembered: Path
    """Matrices that it quantized with these statistics: all that an export of the plan wants."""
    summary: dict[str, Any]
    """Bytes, divergence, interval and so on of the bundle that was measured."""

    def report(self) -> str:
        """A line for people."""
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
def calibration_folder(model: str, base: str | None, text: Path) -> Iterator[Path]:
    """Statistics of a text: made now, removed afterwards.

    Args:
        model: what the user called it.
        base: the base model of an adapter, where it was given.
        text: the file to calibrate on.

    Raises:
        StatisticsError: the calibration failed; it has said why.
    """
    with tempfile.TemporaryDirectory(prefix="neo-calibration-") as folder:
        yield run_calibration(model, text, Path(folder, "stats"), *_base(base))


def run_calibration(model: str, text: Path, output: Path, *options: str) -> Path:
    """Run `neo-calibrate MODEL --text TEXT -o OUTPUT`; its progress goes to our stderr.

    Args:
        model: what the user called it.
        text: the file to calibrate on.
        output: the folder to write.
        options: more of the command's options.

    Raises:
        DependencyError: the calibration, or what it needs, is not installed.
        StatisticsError: it failed; it has said why.
    """
    _require()
    _run(_MODULE, model, "--text", str(text), "-o", str(output), *options)
    return output


def check_search(model: str, base: str | None, text: Path, options: tuple[str, ...]) -> None:
    """Let the search refuse a limit or a text before statistics are made for it.

    Args:
        model: what the user called it.
        base: the base model of an adapter, where it was given.
        text: the file to measure on.
        options: the limit and so on, as the command takes them.

    Raises:
        DependencyError: the calibration, or what it needs, is not installed.
        StatisticsError: it was refused; the search has said why.
    """
    _require()
    _run(f"{_MODULE}.auto", model, "--text", str(text), "--check", *_base(base), *options)


@contextmanager
def searched(
    model: str, base: str | None, text: Path, statistics: Path, options: tuple[str, ...]
) -> Iterator[Searched]:
    """Run `python -m neo_calibration.auto`: the plan that keeps a limit.

    Everything that it writes on the way lies in one folder, which is removed afterwards: a search
    that is killed leaves nothing.

    Args:
        model: what the user called it.
        base: the base model of an adapter, where it was given.
        text: the file to measure on.
        statistics: of the model.
        options: the limit and so on, as the command takes them.

    Raises:
        DependencyError: the calibration, or what it needs, is not installed.
        StatisticsError: it failed; it has said why.
    """
    _require()
    with tempfile.TemporaryDirectory(prefix="neo-auto-") as folder:
        plan, remembered = Path(folder, "plan.json"), Path(folder, "remembered")
        files = ("--text", str(text), "--statistics", str(statistics), "-o", str(plan))
        made = ("--remembered", str(remembered))
        said = _run(f"{_MODULE}.auto", model, *files, *made, *_base(base), *options, scratch=folder)
        yield Searched(WeightPlan.read(plan), remembered, _summary(said))


def _summary(said: str) -> dict[str, Any]:
    """The JSON object in what a child printed; libraries may have printed something before it."""
    try:
        # Its inner objects are indented: the last brace that begins a line is its own.
        found, _ = json.JSONDecoder().raw_decode(said[f"\n{said}".rindex("\n{") :])
    except ValueError as error:
        raise StatisticsError(
            f"{_MODULE}.auto printed no summary, but {said[:200]!r}; report this"
        ) from error
    summary: dict[str, Any] = found
    return summary


def _base(base: str | None) -> tuple[str, ...]:
    return () if base is None else (f"--base={base}",)


def _require() -> None:
    if importlib.util.find_spec(_MODULE) is None:
        raise DependencyError(
            f"calibration needs the package {_MODULE}; install neo-onnx whole, with its extra: "
            "pip install 'neo-onnx[export,torch]'",
            name=_MODULE,
        )


def _run(module: str, *arguments: str, scratch: str | None = None) -> str:
    """Run a module of the calibration; what it printed. `scratch`: for its temporary files."""
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
            f"{module} failed (exit status {child.returncode}); what it said is above"
        )
    return said
