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

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["calibration_folder", "run_calibration"]

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
    if text is None:
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
    if importlib.util.find_spec(_MODULE) is None:
        raise DependencyError(
            f"calibration needs the package {_MODULE}; install neo-onnx whole, with its extra: "
            "pip install 'neo-onnx[export,torch]'",
            name=_MODULE,
        )
    command = [sys.executable, "-m", _MODULE, model, "--text", str(text), "-o", str(output)]
    child = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        status = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if status:
        raise StatisticsError(
            f"calibrating {model} on {text} failed (exit status {status}); what it said is above"
        )
    return output
