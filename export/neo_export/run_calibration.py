"""`neo-export --calibrate-text`: statistics made on the way, by `neo-calibrate` as a child process.

A process of its own, because the export knows nothing of the calibration (which imports PyTorch),
and its memory is given back before weights are written.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError, StatisticsError

from neo_export.quantize.plan import WeightPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["calibration_folder", "run_calibration", "run_search"]

_MODULE = "neo_calibration"


@contextmanager
def calibration_folder(
    model: str, statistics: Path | None, text: Path | None
) -> Iterator[Path | None]:
    """The statistics to use: given, made now and removed afterwards, or none.

    Args:
        model: what the user called it.
        statistics: a folder that is there.
        text: the file to calibrate on.

    Raises:
        StatisticsError: the calibration failed; it has said why.
    """
    if text is None or statistics is not None:  # both are for --auto, which searches on the text
        yield statistics
        return
    with tempfile.TemporaryDirectory(prefix="neo-calibration-") as folder:
        yield run_calibration(model, text, Path(folder, "stats"))


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


def run_search(model: str, text: Path, statistics: Path, options: tuple[str, ...]) -> WeightPlan:
    """Run `python -m neo_calibration.auto`: the plan that keeps a limit.

    Args:
        model: what the user called it.
        text: the file to measure on.
        statistics: of the model.
        options: the limit, as the command takes it.

    Raises:
        DependencyError: the calibration, or what it needs, is not installed.
        StatisticsError: it failed; it has said why.
    """
    _require()
    with tempfile.TemporaryDirectory(prefix="neo-auto-") as folder:
        plan = Path(folder, "plan.json")
        files = ("--text", str(text), "--statistics", str(statistics), "-o", str(plan))
        _run(f"{_MODULE}.auto", model, *files, *options)
        return WeightPlan.read(plan)


def _require() -> None:
    if importlib.util.find_spec(_MODULE) is None:
        raise DependencyError(
            f"calibration needs the package {_MODULE}; install neo-onnx whole, with its extra: "
            "pip install 'neo-onnx[export,torch]'",
            name=_MODULE,
        )


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        status = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if status:
        raise StatisticsError(f"{module} failed (exit status {status}); what it said is above")
