"""The report of a check, as JSON and as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from neo_tools.bench.report import to_markdown

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.gpu import GpuFacts

    from neo_tools.bench.results import Results
    from neo_tools.gpu_check.targets import Verdict

__all__ = ["SCHEMA", "Suite", "write_report"]

SCHEMA = "neo-gpu-check/1"
_TARGET_GPU = "H100"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What the tests that need a GPU said."""

    passed: int
    failed: int
    skipped: int
    exit_status: int
    """pytest's."""

    @property
    def is_correct(self) -> bool:
        """Whether something ran, and nothing failed."""
        return self.exit_status == 0 and self.failed == 0 and self.passed > 0


def write_report(
    folder: Path,
    gpu: GpuFacts,
    suite: Suite,
    runs: dict[str, tuple[Results, list[Verdict]]],
) -> tuple[Path, Path]:
    """Write `gpu-report.json` and `gpu-report.md`.

    Args:
        folder: where to.
        gpu: what everything ran on.
        suite: the tests.
        runs: by backend: the benchmark, and the targets; empty where the tests failed.
    """
    raw: dict[str, Any] = {
        "schema": SCHEMA,
        "gpu": asdict(gpu),
        "suite": asdict(suite) | {"is_correct": suite.is_correct},
        "runs": {
            backend: {
                "targets": [asdict(verdict) for verdict in verdicts],
                "bench": results.to_dict(),
            }
            for backend, (results, verdicts) in runs.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "gpu-report.json", folder / "gpu-report.md"
    paths[0].write_text(json.dumps(raw, indent=1, default=str) + "\n", encoding="utf-8")
    paths[1].write_text(_markdown(gpu, suite, runs), encoding="utf-8")
    return paths


def _markdown(gpu: GpuFacts, suite: Suite, runs: dict[str, tuple[Results, list[Verdict]]]) -> str:
    lines = [
        f"# GPU check on {gpu.name}",
        "",
        f"- device {gpu.index}, compute capability {gpu.compute_capability}, "
        f"{gpu.memory_bytes / 2**30:.0f} GiB, driver for CUDA {gpu.driver_cuda[0]}."
        f"{gpu.driver_cuda[1]}",
        f"- tests: {suite.passed} passed, {suite.failed} failed, {suite.skipped} skipped "
        f"({'correct' if suite.is_correct else 'NOT CORRECT: nothing was measured'})",
        "",
    ]
    if _TARGET_GPU not in gpu.name:
        lines += [f"The targets are for an {_TARGET_GPU}; this is another GPU.", ""]
    for backend, (results, verdicts) in runs.items():
        lines += [
            f"## {backend}",
            "",
            "| target | wanted | measured | verdict |",
            "|---|---|---|---|",
            *(f"| {v.name} | {v.wanted} | {v.measured} | {v.verdict} |" for v in verdicts),
            "",
            to_markdown(results),
        ]
    return "\n".join(lines) + "\n"
