"""Where installed commands begin."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
SCRIPTS = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["scripts"]
INTERRUPTED = """
import sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {modules}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
import {module}
sys.exit({module}.{function}())
"""
"""Ctrl-C while one of `modules` is imported."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_runs_its_own_command(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, function = SCRIPTS[script].partition(":")
    monkeypatch.setattr(sys, "argv", [script, "--version"])
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)()
    assert not end.value.code
    assert capsys.readouterr().out == f"{script} {version('neo-onnx')}\n"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "modules",
    [{"neo_runtime.command.standard_streams"}, {"argparse"}, {"neo_runtime.command.command_line"}],
)
def test_ctrl_c_during_imports(script: str, modules: set[str]) -> None:
    module, _, function = SCRIPTS[script].partition(":")
    code = INTERRUPTED.format(modules=modules, module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
