"""What production pays for: modules of an import, bytes of an installation."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from neo_runtime.errors import DependencyError
from neo_tools import footprint
from neo_tools.footprint import STATEMENTS, import_cost, imports_below
from neo_tools.installed_size import SIZE_LIMIT, closure, installed_size

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., None]:
    """`install(name, {file: bytes}, requires)` lays out a distribution in tmp_path/site."""

    site = tmp_path / "site"
    site.mkdir()

    def make(name: str, files: dict[str, int], requires: tuple[str, ...] = ()) -> None:
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        needed = "".join(f"Requires-Dist: {text}\n" for text in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{needed}")
        for file, size in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_bytes(bytes(size))
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    return make


def test_importing_loads_nothing_of_the_export_machine() -> None:
    for statement in STATEMENTS:
        cost = import_cost(statement, runs=1)
        assert "neo_runtime" in cost.packages
        assert not cost.export_machine
        assert not {"torch", "onnx", "transformers"} & set(cost.packages)


def test_what_must_not_be_loaded_is_found() -> None:
    cost = import_cost("import neo_runtime; import safetensors", runs=1)
    assert cost.export_machine == ("safetensors",)
    assert not cost.is_within


def test_a_statement_that_fails_says_why() -> None:
    with pytest.raises(DependencyError, match="No module named 'no_such_module'"):
        import_cost("import no_such_module", runs=1)


def test_numpy_is_not_counted() -> None:
    lines = """\
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   json
import time:        10 |        110 | neo_runtime.a
import time:      5000 |       5000 |       pickle
import time:      7000 |      12000 |     numpy.core
import time:      9000 |      21000 |   numpy
import time:       200 |        200 |   numpydoc
import time:        20 |      21220 | neo_runtime.b
import time:      3000 |       3000 | onnxruntime
import time:         3 |          3 | neo_runtime.c
""".splitlines()
    assert imports_below(lines) == pytest.approx((333e-6, 24333e-6))


def test_production_is_small() -> None:
    """By the lists of files that pip wrote: no network is needed for it."""
    names = {d.metadata["Name"].lower() for d in closure()}
    assert {"neo-onnx", "numpy", "onnxruntime", "tokenizers"} <= names
    assert not names & {"torch", "transformers", "onnx", "safetensors", "pytest"}
    size = installed_size()
    assert size.distributions.keys() == {d.metadata["Name"] for d in closure()}
    assert size.bytes <= SIZE_LIMIT
    library = next(
        Path(str(file.locate()))
        for file in distribution("onnxruntime").files or ()
        if file.name.startswith("onnxruntime_pybind11_state")
    )
    assert size.distributions["onnxruntime"] > library.stat().st_size
    model = Path(footprint.__file__).parents[2] / "export/neo_export/demo/neo-mini"
    assert size.distributions["neo-onnx"] > (model / "model.safetensors").stat().st_size


def test_every_package_of_the_wheel_counts() -> None:
    """In an editable installation, too."""
    root = Path(footprint.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    folders = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = [file for folder in folders for file in (root / folder).rglob("*") if file.is_file()]
    sources = sum(file.stat().st_size for file in files if "__pycache__" not in file.parts)
    assert 0 <= installed_size().distributions["neo-onnx"] - sources < 100_000


def test_closure_follows_extras_and_markers(tmp_path: Path, install: Callable[..., None]) -> None:
    install(
        "neo-onnx",
        {"neo_runtime/x.py": 7},
        ("a>=1", "B_c[fast]; extra == 'cpu'", "torch; extra == 'torch'"),
    )
    install("a", {"a.py": 100, "__pycache__/a.pyc": 50}, ("b-c", "gone; python_version < '3'"))
    install("b-c", {"b.py": 1000, "../bin/b": 5}, ("a", "speed; extra == 'fast'"))
    install("speed", {"s.py": 10000, "removed/since.py": 1})
    (tmp_path / "site/removed/since.py").unlink()
    found = installed_size([str(tmp_path / "site")])
    assert found.distributions == {"speed": 10000, "b-c": 1005, "a": 150, "neo-onnx": 7}
    assert (found.bytes, found.bytecode_bytes) == (11162, 50)


def test_what_is_not_installed_is_named(tmp_path: Path, install: Callable[..., None]) -> None:
    install("neo-onnx", {"neo_runtime/x.py": 7}, ("numpy>=1",))
    with pytest.raises(DependencyError, match="numpy is not installed"):
        installed_size([str(tmp_path / "site")])


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert footprint.main(["--runs", "1", "--json"]) in (0, 1)  # the time is not asserted
    found = json.loads(capsys.readouterr().out)
    assert [cost["statement"] for cost in found["imports"]] == list(STATEMENTS)
    assert 0 < found["imports"][0]["seconds"] <= found["imports"][0]["seconds_in_all"]
    assert found["size"]["bytes"] == sum(found["size"]["distributions"].values())
    assert found["limits"] == {"import_seconds": 0.3, "installed_bytes": 230_000_000}

    monkeypatch.setattr("neo_tools.installed_size.SIZE_LIMIT", 1_000_000)
    assert footprint.main(["--runs", "1"]) == 1
    text = capsys.readouterr().out
    assert "import neo_runtime\n" in text
    assert "MB installed" in text

    monkeypatch.setattr(footprint, "STATEMENTS", ("import no_such_module",))
    assert footprint.main(["--runs", "1"]) == 2
    assert "no_such_module" in capsys.readouterr().err
