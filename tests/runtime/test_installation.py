"""Which onnxruntime is there: none, one, two that overwrite each other, or the rest of one."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from neo_runtime.errors import DependencyError
from neo_runtime.machine.installation import (
    install_command,
    onnxruntime_is_installed,
    require_onnxruntime,
    version_numbers,
)
from packaging.requirements import Requirement


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_the_real_one() -> None:
    import onnxruntime

    assert require_onnxruntime() is onnxruntime
    assert onnxruntime_is_installed()


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    expected = r"not installed: pip install 'neo-onnx\[cpu\]', or 'neo-onnx\[gpu\]'"
    with pytest.raises(DependencyError, match=expected):
        require_onnxruntime()
    assert not onnxruntime_is_installed()


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "gpu"),
        (("onnxruntime", "onnxruntime-openvino"), "cpu"),
    ],
)
def test_two(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], extra: str) -> None:
    pretend_installed(monkeypatch, *names)
    expected = (
        rf"{' and '.join(names)} are installed together and overwrite each other's files: "
        rf"remove all of them \(pip uninstall {' '.join(names)}\), then install one "
        rf"\(pip install 'neo-onnx\[{extra}\]'\)"
    )
    with pytest.raises(DependencyError, match=expected):
        require_onnxruntime()


def test_the_rest_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "onnxruntime-gpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(DependencyError, match=r"incomplete.*--force-reinstall onnxruntime-gpu"):
        require_onnxruntime()


def test_one_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("libcudart.so.13: cannot open shared object file", name="onnxruntime.x")

    monkeypatch.setattr("neo_runtime.machine.installation.importlib.import_module", fail)
    expected = r"installed but cannot be loaded \(libcudart.*reinstall it: pip install --force-rei"
    with pytest.raises(DependencyError, match=expected):
        require_onnxruntime()


@pytest.mark.parametrize(
    ("installed", "extras", "command"),
    [
        ((), "bench", "pip install 'neo-onnx[bench]'"),
        ((), "diff-gpu", "pip install 'neo-onnx[diff-gpu]'"),
        (("onnxruntime",), "cpu,export", "pip install 'neo-onnx[cpu,export]'"),
        (("onnxruntime-gpu",), "bench", "pip install 'neo-onnx[bench-gpu]'"),
        (("onnxruntime-gpu",), "cpu,export,torch", "pip install 'neo-onnx[gpu,export,torch]'"),
        (("onnxruntime-gpu",), "diff-gpu", "pip install 'neo-onnx[diff-gpu]'"),
        (
            ("onnxruntime",),
            "gpu-check",
            "pip uninstall onnxruntime, then pip install 'neo-onnx[gpu-check]'",
        ),
        (
            ("onnxruntime-openvino",),
            "bench",
            "pip uninstall onnxruntime-openvino, then pip install 'neo-onnx[bench]'",
        ),
        (("onnxruntime-openvino",), "export,torch", "pip install 'neo-onnx[export,torch]'"),
    ],
)
def test_no_advice_brings_a_second_one(
    installed: tuple[str, ...], extras: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, *installed)
    assert install_command(extras) == command


def test_which_extras_bring_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyproject.toml has them: advice would be wrong with an extra that it does not know."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(path.read_text("utf-8"))["project"]["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        found = set()
        for requirement in map(Requirement, extras[extra]):
            if requirement.name == "neo-onnx":
                found |= set().union(*map(brought, requirement.extras))
            elif requirement.name in ("onnxruntime", "onnxruntime-gpu"):
                found.add(requirement.name)
        return found

    assert brought("bench-gpu") == brought("diff-gpu") == {"onnxruntime-gpu"}
    for extra in extras.keys() - {"test"}:
        for other, wheel in (
            ("onnxruntime-gpu", {"onnxruntime"}),
            ("onnxruntime", {"onnxruntime-gpu"}),
        ):
            pretend_installed(monkeypatch, other)
            command = install_command(extra)
            advised = command.partition("[")[2].partition("]")[0]
            assert not brought(advised) & wheel or f"pip uninstall {other}," in command, extra


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("1.23.0", (1, 23)),
        ("1.23", (1, 23)),
        ("1.100.2", (1, 100, 2)),
        ("1.24.0rc1", (1, 24)),
        ("2.0.0+cu130", (2,)),
        ("0", (0,)),
    ],
)
def test_version_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert version_numbers(version) == numbers


@pytest.mark.parametrize("version", ["", "new", "v1.2"])
def test_what_is_no_version(version: str) -> None:
    with pytest.raises(ValueError, match="is not a version"):
        version_numbers(version)


def test_opening_a_bundle_needs_onnxruntime_only_when_asked() -> None:
    code = "import sys, neo_runtime.bundle.folder; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("set_to", "found"), [(None, "1"), ("0", "0")])
def test_usage_reports_are_off_unless_the_user_decided(set_to: str | None, found: str) -> None:
    """Before onnxruntime is imported, or it has made an identity already."""
    code = (
        "import os, sys; from neo_runtime.machine import installation; "
        "assert 'onnxruntime' not in sys.modules; installation.require_onnxruntime(); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if set_to is not None:
        environment["ORT_DISABLE_TELEMETRY"] = set_to
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


SOURCES = [
    file
    for folder in ("runtime", "export", "calibration", "tools")
    for file in sorted((Path(__file__).parents[2] / folder).rglob("*.py"))
    # Scripts that run in a peer's environment: `worker_environ` sets the variable for them.
    if not file.name.startswith("worker_") and file.name != "installation.py"
]


def test_nothing_imports_onnxruntime_past_the_function_that_turns_reports_off() -> None:
    """A submodule may be imported once the package has been."""
    assert len(SOURCES) > 100
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert "onnxruntime" not in names, file
