"""The report of a GPU check, as JSON and as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from neo_export.files.text_file import write_text_file

from neo_tools.bench.report import to_markdown

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.machine.gpu import GpuFacts

    from neo_tools.bench.results import Results
    from neo_tools.gpu_check.targets import Verdict

__all__ = ["SCHEMA", "BackendRun", "Suite", "write_report"]

SCHEMA = "neo-gpu-check/2"
_TARGET_GPU = "H100"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Results of the tests that need a GPU."""

    passed: int
    failed: int
    skipped: int
    exit_status: int
    """Exit status of pytest."""

    @property
    def is_correct(self) -> bool:
        """Whether at least one test ran and none failed."""
        return self.exit_status == 0 and self.failed == 0 and self.passed > 0


@dataclass(frozen=True, kw_only=True)
class BackendRun:
    """Measurements of one backend so far."""

    planned: tuple[str, ...]
    """Titles of the parts of the benchmark, which name the peers."""
    benches: dict[str, Results] = field(default_factory=dict)
    """Results of the finished parts, by title."""
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """Titles of the parts that were not measured (yet)."""
        return [title for title in self.planned if title not in self.benches]


def write_report(
    folder: Path,
    gpu: GpuFacts,
    suite: Suite | None,
    runs: dict[str, BackendRun],
) -> tuple[Path, Path]:
    """Write `gpu-report.json` and `gpu-report.md`.

    Args:
        folder: folder of the report; created if it does not exist.
        gpu: the GPU that everything ran on.
        suite: results of the tests; None if they were not run.
        runs: measurements by backend; empty if the tests failed.

    Returns:
        The paths of both files.
    """
    raw: dict[str, Any] = {
        "schema": SCHEMA,
        "gpu": asdict(gpu),
        "suite": suite and asdict(suite) | {"is_correct": suite.is_correct},
        "runs": {
            backend: {
                "targets": [asdict(verdict) for verdict in run.verdicts],
                "missing": run.missing,
                "benches": {title: results.to_dict() for title, results in run.benches.items()},
            }
            for backend, run in runs.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "gpu-report.json", folder / "gpu-report.md"
    write_text_file(paths[0], json.dumps(raw, indent=1, default=str) + "\n")
    write_text_file(paths[1], _markdown(gpu, suite, runs))
    return paths


def _suite_text(suite: Suite | None) -> str:
    if suite is None:
        return "not run (--no-tests)"
    return (
        f"{suite.passed} passed, {suite.failed} failed, {suite.skipped} skipped "
        f"({'correct' if suite.is_correct else 'NOT CORRECT: nothing was measured'})"
    )


def _markdown(gpu: GpuFacts, suite: Suite | None, runs: dict[str, BackendRun]) -> str:
    lines = [
        f"# GPU check on {gpu.name}",
        "",
        f"- device {gpu.index}, compute capability {gpu.compute_capability}, "
        f"{gpu.memory_bytes / 2**30:.0f} GiB, driver for CUDA {gpu.driver_cuda[0]}."
        f"{gpu.driver_cuda[1]}",
        f"- tests: {_suite_text(suite)}",
        "",
    ]
    if _TARGET_GPU not in gpu.name:
        lines += [f"The targets are for an {_TARGET_GPU}; this is another GPU.", ""]
    for backend, run in runs.items():
        lines += [
            f"## {backend}",
            "",
            "| metric | target | measured | verdict |",
            "|---|---|---|---|",
            *(f"| {v.name} | {v.wanted} | {v.measured} | {v.verdict} |" for v in run.verdicts),
            "",
        ]
        if run.missing:
            lines += [f"NOT MEASURED: {backend} beside {', '.join(run.missing)}.", ""]
        for title, results in run.benches.items():
            lines += [f"### {backend} beside {title}", "", to_markdown(results)]
    return "\n".join(lines) + "\n"
