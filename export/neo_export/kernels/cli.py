"""`neo-kernels BUNDLE`: compile a bundle's decode step for one compute capability."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from neo_runtime.command.command_line import OneLineParser, add_version, run_command
from neo_runtime.errors import DeviceError, NeoError, RequestError

from neo_export.reports.stages import StageLine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from neo_export.kernels.build import BuiltKernels

__all__ = ["main"]

_EPILOG = """\
BUNDLE must have been written by neo-export --target cuda. The kernels replace the decode graph for
batches of up to 32 sequences and use the same weights; onnxruntime still computes prompts. They are
written to BUNDLE/engines, where neo_runtime.load finds them on GPUs of this compute capability;
delete the file to go back to the graph. They have not run on a GPU yet: check them with neo-diff
--backend cuda before use. Progress goes to stderr, the summary to stdout. Exit status: 0 built, 2
not built, 130 interrupted.
"""
_KNOWN = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
"""Compute capabilities from Ampere on (NVIDIA, CUDA GPU Compute Capability)."""
_OVERLAPS = 9
"""First major compute capability with programmatic dependent launch."""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="neo-kernels",
        description="Compile a bundle's decode step for NVIDIA GPUs of one compute capability.",
        epilog=_EPILOG,
    )
    add_version(parser)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder with neo.json")
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="compute capability to compile for, such as 9.0 for an H100 (default: this machine's "
        "GPU)",
    )
    parser.add_argument(
        "--no-overlap",
        action="store_true",
        help="do not start a kernel before the previous one has ended (default: from 9.0 on, "
        "kernels start early and load weights while they wait)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(
        "neo-kernels",
        lambda: _build(arguments),
        extras="export,kernels",
        interrupted="interrupted, nothing was written",
    )


def _build(arguments: argparse.Namespace) -> int:
    from neo_runtime.bundle.folder import open_bundle

    from neo_export.kernels.build import build_kernels, planned_steps

    # Refuse bundles without kernels before looking for a GPU.
    planned_steps(open_bundle(arguments.bundle, check_runtime=False), overlap=False)
    capability = _capability(arguments.compute_capability)
    overlap = int(capability.split(".")[0]) >= _OVERLAPS and not arguments.no_overlap
    with StageLine("neo-kernels") as bar:
        built = build_kernels(arguments.bundle, capability, overlap=overlap, progress=bar.show)
    print(json.dumps(_facts(built), indent=1) if arguments.json else _report(built))
    return 0


def _capability(asked: str | None) -> str:
    if asked is None:
        from neo_runtime.machine.gpu import require_gpu

        try:
            asked = require_gpu().compute_capability
        except NeoError as error:
            raise DeviceError(
                f"{error}; or name the GPUs to compile for, such as --compute-capability 9.0"
            ) from error
    if asked not in _KNOWN:
        raise RequestError(
            f"the compute capability is {asked!r}, expected one of {', '.join(_KNOWN)}; for other "
            "GPUs there are no kernels, use the bundle without them"
        )
    return asked


def _facts(built: BuiltKernels) -> dict[str, object]:
    kernels = built.kernels
    return {
        "path": str(built.path),
        "compute_capability": kernels.compute_capability,
        "compiler": kernels.compiler,
        "overlap": kernels.overlap,
        "kernels": len(kernels.kernels),
        "launches": {str(step.max_rows): len(step.launches) for step in kernels.steps},
        "memory_bytes": kernels.memory_bytes,
        "size": built.size,
        "seconds": built.seconds,
    }


def _report(built: BuiltKernels) -> str:
    kernels = built.kernels
    launches = ", ".join(
        f"{len(step.launches)} up to batch {step.max_rows}" for step in kernels.steps
    )
    early = "; each may start before the previous one has ended" if kernels.overlap else ""
    return "\n".join(
        [
            f"kernels     {built.path}",
            f"for         compute capability {kernels.compute_capability}; {kernels.compiler}",
            f"launches    {launches}{early}",
            f"memory      {kernels.memory_bytes / 1e6:,.1f} MB on the GPU besides the weights",
            f"size        {built.size / 1e6:,.1f} MB, {len(kernels.kernels)} kernels",
            f"time        {built.seconds:.1f} s",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
