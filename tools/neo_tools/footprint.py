"""`python -m neo_tools.footprint`: import time and installed size of the runtime.

It measures how long `import neo_runtime` takes in a new interpreter and which packages it loads,
and the size on disk of `pip install neo-onnx[cpu]`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser
from neo_runtime.errors import DependencyError, NeoError

from neo_tools.installed_size import SIZE_LIMIT, InstalledSize, files_size, installed_size

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EXPORT_MACHINE", "IMPORT_LIMIT", "STATEMENTS", "ImportCost", "import_cost", "main"]

IMPORT_LIMIT = 0.3
"""Limit of the import time in seconds, without `NOT_COUNTED`."""
STATEMENTS = ("import neo_runtime", "from neo_runtime import *; import onnxruntime, tokenizers")
"""Imports the package alone; and everything that a program for text generation imports."""
EXPORT_MACHINE = ("onnx", "onnxscript", "safetensors", "tensorrt", "torch", "transformers")
"""Packages for export, which the runtime must not import."""
NOT_COUNTED = ("numpy", "onnxruntime")
"""Packages whose own import time this project cannot shorten."""

_MARKER = "neo_tools.footprint begins"


@dataclass(frozen=True, kw_only=True)
class ImportCost:
    """Cost of an import statement in a new interpreter."""

    statement: str
    seconds: float
    """Median of the runs, without numpy and onnxruntime and the modules that these import."""
    seconds_in_all: float
    """Median of the runs, including them."""
    runs: int
    packages: tuple[str, ...]
    """Top-level modules loaded, without the standard library."""
    export_machine: tuple[str, ...]
    """The packages of `EXPORT_MACHINE` among them."""

    @property
    def is_within(self) -> bool:
        """Whether no package of `EXPORT_MACHINE` was loaded and the time is within the limit."""
        return not self.export_machine and self.seconds <= IMPORT_LIMIT


def import_cost(statement: str, runs: int = 7, python: str = sys.executable) -> ImportCost:
    """Run an import statement in new interpreters and take medians.

    Args:
        statement: Python code.
        runs: measured runs, after one run of warm-up.
        python: path of the interpreter.

    Raises:
        DependencyError: the statement fails.
    """
    outputs = [_import_once(statement, python) for _ in range(runs + 1)][1:]
    trees = [imports_below(lines) for lines, _ in outputs]
    packages = outputs[-1][1]
    return ImportCost(
        statement=statement,
        seconds=statistics.median(counted for counted, _ in trees),
        seconds_in_all=statistics.median(everything for _, everything in trees),
        runs=runs,
        packages=packages,
        export_machine=tuple(name for name in EXPORT_MACHINE if name in packages),
    )


def imports_below(lines: Sequence[str]) -> tuple[float, float]:
    """Sum the output of `python -X importtime`.

    The line of a module follows those of the modules that it imported, which are indented more.
    Read backwards, the lines are a tree in preorder. A module of the standard library counts
    towards numpy if numpy is the first to import it.

    Returns:
        Seconds without `NOT_COUNTED` and what these import, and seconds in all.
    """
    counted = everything = 0
    skipped_depth: int | None = None
    for line in reversed(lines):
        if not line.startswith("import time:") or "[us]" in line:
            continue
        own, _, name = line.removeprefix("import time:").split("|")
        depth = len(name) - len(name.lstrip())
        everything += int(own)
        if skipped_depth is not None and depth > skipped_depth:
            continue
        skipped_depth = depth if name.strip().partition(".")[0] in NOT_COUNTED else None
        counted += 0 if skipped_depth is not None else int(own)
    return counted / 1e6, everything / 1e6


def _import_once(statement: str, python: str) -> tuple[list[str], tuple[str, ...]]:
    """The output of importtime for the statement, and the packages that it loaded."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"sys.stderr.write('{_MARKER}\\n'); sys.stderr.flush()\n"
        f"{statement}\n"
        f"sys.stderr.write('{_MARKER}\\n'); sys.stderr.flush()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [python, "-I", "-X", "importtime", "-c", code],
        env={"ORT_DISABLE_TELEMETRY": "1", **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DependencyError(
            f"`{statement}` fails in {python}: {reason}; install neo-onnx there, with its extra "
            "cpu or gpu"
        )
    return done.stderr.split(_MARKER)[1].splitlines(), tuple(done.stdout.split())


@dataclass(frozen=True, kw_only=True)
class _Footprint:
    imports: tuple[ImportCost, ...]
    size: InstalledSize

    @property
    def is_within(self) -> bool:
        return self.size.is_within and all(cost.is_within for cost in self.imports)

    def to_json(self) -> str:
        limits = {"import_seconds": IMPORT_LIMIT, "installed_bytes": SIZE_LIMIT}
        return json.dumps({**asdict(self), "limits": limits, "is_within": self.is_within}, indent=1)

    def to_text(self) -> str:
        lines = []
        for cost in self.imports:
            lines += [
                f"{cost.statement}",
                f"  {cost.seconds:.3f} s without numpy and onnxruntime (limit {IMPORT_LIMIT} s), "
                f"{cost.seconds_in_all:.3f} s with them; median of {cost.runs}",
                f"  loads {', '.join(cost.packages)}; packages for export: "
                f"{', '.join(cost.export_machine) or 'nothing'}",
            ]
        size = self.size
        lines += [
            f"neo-onnx[cpu]: {size.bytes / 1e6:.1f} MB installed "
            f"(limit {SIZE_LIMIT / 1e6:.0f} MB), of it {size.bytecode_bytes / 1e6:.1f} MB bytecode "
            f"({size.method})",
            *(f"  {count / 1e6:7.2f} MB  {name}" for name, count in size.distributions.items()),
        ]
        return "\n".join(lines)


def _measure_fresh(source: str, constraints: Path | None, runs: int) -> _Footprint:
    """Install `source[cpu]` into a new virtual environment, and measure that."""
    with tempfile.TemporaryDirectory(prefix="neo-footprint-") as folder:
        venv.create(folder, with_pip=True)
        scripts = sysconfig.get_path("scripts", "venv", vars={"base": folder})
        python = str(Path(scripts, "python.exe" if os.name == "nt" else "python"))
        site = sysconfig.get_path("purelib", "venv", vars={"base": folder})
        before, compiled_before = files_size(Path(site).rglob("*"))  # pip itself
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--constraint", str(constraints)] if constraints else []
        command += [f"{source}[cpu]"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NeoError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")
        # Measured before any import, as imports write bytecode.
        size, compiled = files_size(Path(site).rglob("*"))
        by_name = installed_size(path=[site]).distributions
        costs = tuple(import_cost(statement, runs, python) for statement in STATEMENTS)
    measured = InstalledSize(
        method="growth of a new environment's site-packages",
        bytes=size - before,
        bytecode_bytes=compiled - compiled_before,
        distributions=by_name,
    )
    return _Footprint(imports=costs, size=measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineParser(
        prog="python -m neo_tools.footprint",
        description="Measure the import time and the installed size of the runtime.",
        epilog="exit status: 0 within the limits; 1 a limit is exceeded, or a package for export "
        "is loaded; 2 wrong usage, or it cannot be measured",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the result to a file, as JSON"
    )
    parser.add_argument(
        "--runs", type=int, default=7, metavar="N", help="measured imports (default: 7)"
    )
    parser.add_argument(
        "--fresh",
        metavar="SOURCE",
        nargs="?",
        const=".",
        help="install SOURCE (a checkout; default: this folder) into a new environment, and "
        "measure that one",
    )
    parser.add_argument(
        "--constraints", type=Path, metavar="FILE", help="constraints (pinned versions) for --fresh"
    )
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}, expected at least 1")
    try:
        found = (
            _Footprint(
                imports=tuple(import_cost(text, arguments.runs) for text in STATEMENTS),
                size=installed_size(),
            )
            if arguments.fresh is None
            else _measure_fresh(arguments.fresh, arguments.constraints, arguments.runs)
        )
    except NeoError as error:
        print(f"neo_tools.footprint: {error}", file=sys.stderr)
        return 2
    if arguments.output is not None:
        arguments.output.write_text(found.to_json() + "\n", encoding="utf-8")
    print(found.to_json() if arguments.json else found.to_text())
    return 0 if found.is_within else 1


if __name__ == "__main__":
    sys.exit(main())
