"""Who imports whom, read from the sources: data flows one way; and that names can be imported."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import neo_calibration
import neo_calibration.auto
import neo_export
import neo_export.comparison
import neo_export.decisions
import neo_export.reports
import neo_runtime
import neo_runtime.backends
import neo_server
import neo_tools
import neo_tools.bench
import neo_tools.diff
import neo_tools.evaluate
import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[1]
OURS = ("neo_runtime", "neo_server", "neo_export", "neo_calibration", "neo_tools")
ALLOWED = {
    "runtime/neo_runtime": ("neo_runtime",),
    "runtime/neo_server": ("neo_server", "neo_runtime"),
    "export/neo_export": (
        "neo_export",
        "neo_runtime.closable",
        "neo_runtime.command.command_line",
        "neo_runtime.machine.cores",
        "neo_runtime.bundle.engine_record",
        "neo_runtime.bundle.folder",
        "neo_runtime.bundle.step_kernels",
        "neo_runtime.entry",
        "neo_runtime.errors",
        "neo_runtime.json_input",
        "neo_runtime.machine.gpu",
        "neo_runtime.machine.installation",
        "neo_runtime.bundle.manifest",
        "neo_runtime.options.generation_options",
        "neo_runtime.backends.tensorrt.log",
    ),
    "calibration/neo_calibration": ("neo_calibration", "neo_export", "neo_runtime"),
    "tools/neo_tools": OURS,
}
TOP = {Path(folder).name: ROOT / folder for folder in ALLOWED}
FOLDERS = {
    package: TOP[package.__name__.partition(".")[0]].joinpath(*package.__name__.split(".")[1:])
    for package in (
        neo_calibration,
        neo_calibration.auto,
        neo_export,
        neo_export.comparison,
        neo_export.decisions,
        neo_export.reports,
        neo_runtime,
        neo_runtime.backends,
        neo_server,
        neo_tools,
        neo_tools.bench,
        neo_tools.diff,
        neo_tools.evaluate,
    )
}
PARTS = {
    package: tuple(re.findall(r"^(\w+)  +\S", package.__doc__ or "", re.MULTILINE))
    for package in FOLDERS
}
"""Folders and files of a package, in its own list: each imports only itself and those before."""


def imports(file: Path) -> set[str]:
    """Modules of ours that a source file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules if node.module in OURS else {node.module}
    return {name for name in found if name.partition(".")[0] in OURS}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_only_what_it_may(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            allowed = any(name == a or name.startswith(f"{a}.") for a in ALLOWED[folder])
            assert allowed, f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", PARTS)
def test_every_part_has_its_place(package: ModuleType) -> None:
    folder = FOLDERS[package]
    sources = {path.relative_to(folder).parts[0] for path in folder.rglob("*.py")}
    assert {name.removesuffix(".py") for name in sources} == {*PARTS[package], "__init__"}


@pytest.mark.parametrize(
    ("package", "part"), [(package, part) for package, parts in PARTS.items() for part in parts]
)
def test_a_package_flows_one_way(package: ModuleType, part: str) -> None:
    folder, parts = FOLDERS[package], PARTS[package]
    allowed = parts[: parts.index(part) + 1]
    for file in (folder / f"{part}.py", *sorted((folder / part).rglob("*.py"))):
        for name in imports(file) if file.is_file() else ():
            assert name != package.__name__, f"{file.relative_to(ROOT)} imports {name} whole"
            inside = name.removeprefix(f"{package.__name__}.")
            fits = inside == name or inside.partition(".")[0] in allowed
            assert fits, f"{file.relative_to(ROOT)} imports {name}"


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("def f():\n    from neo_export import exporter\n    import neo_tools.diff\n")
    assert imports(source) == {"neo_export.exporter", "neo_tools.diff"}


def public_names(file: Path) -> list[str]:
    """`__all__` of a source file; empty where it has none."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


@pytest.mark.parametrize("folder", ALLOWED)
def test_public_names_are_there(folder: str) -> None:
    """Also those that only type checkers look at."""
    source = (ROOT / folder).parent
    found = 0
    for file in sorted((ROOT / folder).rglob("*.py")):
        names = public_names(file)
        if names:
            module = file.relative_to(source).with_suffix("").as_posix().removesuffix("/__init__")
            loaded = importlib.import_module(module.replace("/", "."))
            missing = [name for name in names if not hasattr(loaded, name)]
            assert not missing, f"{file.relative_to(ROOT)}: {missing}"
            found += len(names)
    assert found > 1
