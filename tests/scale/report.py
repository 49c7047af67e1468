"""The report: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .session import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figures import Figure, StepResult

__all__ = ["machine", "to_json", "to_markdown"]

_PACKAGES = ("neo-onnx", "numpy", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")


def machine() -> dict[str, str]:
    """Where and with what the figures were measured."""
    return {
        "processor": _from_proc("cpuinfo", "model name") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": _from_proc("meminfo", "MemTotal"),
        "load average at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD")
        + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
    }


def to_json(
    checkpoint: dict[str, Any], where: dict[str, str], results: Sequence[StepResult]
) -> str:
    """Everything, with each figure's verdict (true, false, or null where not judged)."""
    steps = [
        asdict(result)
        | {
            "verdict": result.verdict,
            "figures": [asdict(figure) | {"passed": figure.passed} for figure in result.figures],
        }
        for result in results
    ]
    return json.dumps({"checkpoint": checkpoint, "machine": where, "steps": steps}, indent=1)


def to_markdown(
    checkpoint: dict[str, Any], where: dict[str, str], results: Sequence[StepResult]
) -> str:
    """A table a command, a section a step."""
    shape = ", ".join(f"{key} {value}" for key, value in checkpoint.items())
    lines = ["# What the project shows at scale", "", f"Checkpoint: {shape}.", ""]
    lines += [f"- {key}: {value}" for key, value in where.items()]
    lines += ["", "| step | what | verdict | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {result.name} | {result.summary} | {result.verdict} | {result.seconds:.0f} |"
        for result in results
    ]
    for result in results:
        lines += ["", f"## {result.name}: {result.verdict}", ""]
        if reason := result.skipped or result.error:
            lines += ["```", reason, "```"]
        for command, figures in groupby(result.figures, key=lambda figure: figure.command):
            lines += [f"`{command}`", "", "| figure | value | limit | | |", "|---|---|---|---|---|"]
            lines += [_row(figure) for figure in figures]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _row(figure: Figure) -> str:
    limit = "" if figure.limit is None else f"{figure.relation} {_number(figure.limit)}"
    verdict = {True: "ok", False: "**FAILED**", None: ""}[figure.passed]
    value = f"{_number(figure.value)} {figure.unit}".strip()
    return f"| {figure.name} | {value} | {limit} | {verdict} | {figure.note} |"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value[:12]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _from_proc(file: str, key: str) -> str:
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
