"""Every command line ends in the same way, with its own name, its own words and its own extras."""

from __future__ import annotations

import inspect
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))[
    "project"
]
EXTRAS = set(PROJECT["optional-dependencies"])

NOTHING = "interrupted, nothing was written"
RESUMES = "interrupted; the same command continues after the last finished layer"
COMMANDS = [
    ("neo_export.command.cli", "_run", ["-o", "b"], "neo-export", NOTHING),
    ("neo_export.engine.cli", "_build", ["b"], "neo-engine", NOTHING),
    ("neo_export.kernels.cli", "_build", ["b"], "neo-kernels", NOTHING),
    ("neo_calibration.cli", "_run", ["m", "--text", "t", "-o", "s"], "neo-calibrate", RESUMES),
    (
        "neo_calibration.auto.__main__",
        "_run",
        ["m", "--text", "t", "--statistics", "s", "-o", "p", "--max-kl", "1"],
        "neo-auto",
        NOTHING,
    ),
    ("neo_runtime.command.generate", "_run", ["b", "p"], "neo-generate", None),
    ("neo_server.command", "_serve", ["b"], "neo-serve", None),
    ("neo_tools.bench.cli", "_run", ["b"], "neo-bench", None),
    ("neo_tools.diff.cli", "_run", ["b", "--reference", "m"], "neo-diff", None),
    ("neo_tools.evaluate.cli", "_run", ["b", "--tasks", "t"], "neo-eval", None),
    ("neo_tools.gpu_check.__main__", "_run", [], "gpu-check", None),
]


@pytest.mark.parametrize(("module", "work", "arguments", "program", "words"), COMMANDS)
def test_ends(
    module: str,
    work: str,
    arguments: list[str],
    program: str,
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = import_module(module)

    def end_with(error: BaseException) -> tuple[int, str]:
        def fail(*_: Any) -> int:
            raise error

        monkeypatch.setattr(command, work, fail)
        status = command.main(arguments)
        out, err = capsys.readouterr()
        assert out == ""
        return status, err

    interrupted = "" if words is None else f"{program}: {words}\n"
    assert end_with(KeyboardInterrupt()) == (130, interrupted)
    status, line = end_with(ModuleNotFoundError("no", name="onnx"))
    assert status == 2
    assert line.startswith(f"{program}: the package onnx is missing; install neo-onnx with its ex")
    extras = line.partition("[")[2].partition("]")[0].split(",")
    assert set(extras) <= EXTRAS


OTHERS = (
    "neo_runtime.command.verify",
    "neo_tools.bench.operators",
    "neo_tools.clients.__main__",
    "neo_tools.drafts.__main__",
    "neo_tools.footprint",
    "neo_tools.older_cpu.__main__",
    "neo_tools.peers.__main__",
)


@pytest.mark.parametrize("module", [*(module for module, *_ in COMMANDS), *OTHERS])
@pytest.mark.parametrize("option", ["--no-such-option", "--hel"])
def test_wrong_usage_is_one_line_and_options_are_not_shortened(
    module: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = next((arguments for name, _, arguments, *_ in COMMANDS if name == module), [])
    with pytest.raises(SystemExit) as end:
        import_module(module).main([*given, option])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith(" --help\n")


def test_every_script_of_the_package_is_here() -> None:
    """But neo-verify: damage is its result, and its end is a report in any case."""
    found = [target.partition(":") for target in PROJECT["scripts"].values()]
    starts = [getattr(import_module(module), name) for module, _, name in found]
    scripts = {inspect.getclosurevars(start).nonlocals["module"] for start in starts}
    assert scripts - {module for module, *_ in COMMANDS} == {"neo_runtime.command.verify"}
