"""`python -m neo_tools.gpu_check [MODEL]`: run the GPU tests and benchmarks, and write a report."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, run_command
from neo_runtime.errors import NeoError

from neo_tools.arguments import add_device

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from neo_tools.bench.cases import Settings
    from neo_tools.gpu_check.report import BackendRun, Suite

__all__ = ["main"]

_DONE, _WRONG_NUMBERS = 0, 1
_EPILOG = """The report is written after the tests and again after each part of the benchmark, so an
interruption loses no finished measurement.

exit status: 0 the tests passed (or --no-tests) and the report is complete, whether or not the
targets are met; 1 a test failed, or none ran (the report says so, and nothing is measured); 2 no
usable GPU, wrong usage, or a bundle that cannot be exported or run"""
_TESTS = Path(__file__).parents[3] / "tests" / "gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineParser(
        prog="python -m neo_tools.gpu_check",
        description="Run all tests and benchmarks that need an NVIDIA GPU, and write a report.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="checkpoint to measure (default: the demo model)",
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=("cuda", "tensorrt"),
        default=[],
        help="backend to measure; may be repeated (default: cuda)",
    )
    add_device(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/gpu"),
        metavar="FOLDER",
        help="folder of the report (default: build/gpu)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=5,
        metavar="N",
        help="rounds of each measurement (default: 5)",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="measure the backend cuda with compiled kernels for decode steps (neo-kernels)",
    )
    parser.add_argument(
        "--no-tests",
        action="store_true",
        help="skip the tests; the report says so",
    )
    arguments = parser.parse_args(argv)
    if arguments.repetitions < 1:
        parser.error(f"--repetitions is {arguments.repetitions}, expected at least 1")
    return run_command("gpu-check", lambda: _run(arguments), extras="gpu-check")


def _run(arguments: argparse.Namespace) -> int:
    from neo_export.files.termination import termination_raises
    from neo_runtime.machine.gpu import require_gpu

    from neo_tools.gpu_check.report import write_report

    gpu = require_gpu(arguments.device)
    suite = None if arguments.no_tests else run_suite(_TESTS, arguments.device)
    runs: dict[str, BackendRun] = {}
    paths = write_report(arguments.output, gpu, suite, runs)
    print(f"gpu-check: the report so far: {paths[1]}", file=sys.stderr)
    if suite is None or suite.is_correct:
        with (
            termination_raises(),
            tempfile.TemporaryDirectory(dir=arguments.output) as folder,
        ):
            for backend in arguments.backend or ["cuda"]:
                for run in _measure(arguments, backend, Path(folder)):
                    runs[backend] = run
                    write_report(arguments.output, gpu, suite, runs)
    print("\n".join(str(path) for path in paths))
    return _DONE if suite is None or suite.is_correct else _WRONG_NUMBERS


def run_suite(tests: Path, device: int = 0) -> Suite:
    """Run the tests that need a GPU in a subprocess; their output goes to stderr.

    Args:
        tests: folder of the tests.
        device: index of the GPU; the tests see no other.
    """
    from neo_tools.gpu_check.report import Suite

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]
        status = subprocess.run(
            [*command, f"--junitxml={found}"],
            stdout=sys.stderr,
            env=os.environ | _only_gpu(device),
        ).returncode
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        if found.exists():
            for suite in ET.parse(found).getroot().iter("testsuite"):
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    return Suite(
        passed=counts["tests"] - failed - counts["skipped"],
        failed=failed,
        skipped=counts["skipped"],
        exit_status=status,
    )


def _measure(arguments: argparse.Namespace, backend: str, folder: Path) -> Iterator[BackendRun]:
    """Export bundles, benchmark them against PyTorch, and compare with the targets.

    Yields:
        The results so far: first none, then once after each part of the benchmark.
    """
    from neo_export.command.cli import DEMO
    from neo_export.exporter import ExportOptions, export_bundle

    from neo_tools.bench.run import run
    from neo_tools.gpu_check.report import BackendRun
    from neo_tools.gpu_check.targets import MANY, judge

    model = DEMO if arguments.model is None else Path(arguments.model)
    bundles = {}
    for precision in ("fp16", "int4"):
        bundles[precision] = folder / f"{backend}-{precision}"
        export_bundle(
            str(model), bundles[precision], ExportOptions(target=backend, precision=precision)
        )
        if backend == "tensorrt":
            many = ("--max-batch", str(MANY))
            _build("neo_export.engine.cli", bundles[precision], arguments.device, *many)
        elif arguments.kernels:
            _build("neo_export.kernels.cli", bundles[precision], arguments.device)
    parts = dict(_parts(arguments, backend, model, bundles))
    found = BackendRun(planned=tuple(parts))
    yield found
    for title, settings in parts.items():
        results = run(settings, lambda line: print(line, file=sys.stderr, flush=True))
        verdicts = found.verdicts or judge(results, bundles["fp16"].name, bundles["int4"].name)
        benches = found.benches | {title: results}
        found = BackendRun(planned=tuple(parts), benches=benches, verdicts=verdicts)
        yield found


def _parts(
    arguments: argparse.Namespace, backend: str, model: Path, bundles: dict[str, Path]
) -> Iterator[tuple[str, Settings]]:
    """The parts of the benchmark, by title.

    First the one for the targets; then `torch.compile`, whose first calls take minutes.
    """
    from neo_tools.bench.cases import PeerChoice, Settings, make_cases
    from neo_tools.gpu_check.targets import LONG_PROMPT, MANY, SHORT

    longest = min(LONG_PROMPT, _positions(bundles["fp16"]) - 1)
    shared = {"threads": (1,), "new_tokens": (64,), "depths": (SHORT,)}
    one = make_cases(prompts=(longest,), batches=(1,), **shared)
    many = make_cases(prompts=(0,), batches=(MANY,), **shared)
    for title, chosen, peer, cases in (
        ("PyTorch eager", tuple(bundles.values()), "fp16", one + many),
        ("torch.compile", (bundles["fp16"],), "fp16-compiled", one),
    ):
        yield (
            title,
            Settings(
                bundles=chosen,
                peers=(PeerChoice(name="torch", precision=peer),),
                model=model,
                threads=(1,),
                repetitions=arguments.repetitions,
                backend=backend,
                device=arguments.device,
                cases=cases,
            ),
        )


def _positions(bundle: Path) -> int:
    from neo_runtime.bundle.folder import open_bundle

    return open_bundle(bundle).manifest.max_length


def _only_gpu(device: int) -> dict[str, str]:
    """Environment variables of a subprocess that sees only this GPU, as device 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = visible[device] if device < len(visible) and visible[device] else str(device)
    return {"CUDA_VISIBLE_DEVICES": seen}


def _build(command: str, bundle: Path, device: int, *options: str) -> None:
    """Build a TensorRT plan or kernels for the GPU.

    Args:
        command: module of the command that builds; run in a subprocess.
        bundle: the bundle to build for.
        device: index of the GPU.
        options: further arguments of the command.

    Raises:
        NeoError: the command failed.
    """
    words = [sys.executable, "-m", command, str(bundle), *options]
    if subprocess.run(words, stdout=sys.stderr, env=os.environ | _only_gpu(device)).returncode:
        raise NeoError(f"{command} failed for {bundle}; see its output above")


if __name__ == "__main__":
    sys.exit(main())
