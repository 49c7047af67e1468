"""Makes onnxruntime use its kernels for CPUs without AVX-512 and VNNI, whatever this CPU has."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import onnxruntime
from neo_runtime.errors import DependencyError
from neo_tools.older_cpu.copies import build_answers, copied, require_tools

__all__ = ["older_environ", "why_impossible", "why_needless"]


def why_impossible() -> str | None:
    """Why an AVX2-only CPU cannot be simulated on this machine; None if it can."""
    try:
        require_tools()
    except DependencyError as error:
        return str(error)
    if " avx2 " not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        return f"this CPU ({platform.processor() or 'x86-64'}) has no AVX2"
    return None


def why_needless() -> str | None:
    """Why simulation is needless: onnxruntime uses these kernels anyway; None if it is needed."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    if {"avx512f", "avx_vnni"} & set(flags):
        return None
    return "this CPU has neither AVX-512 nor AVX-VNNI: all tests run on these kernels"


def older_environ(folder: Path) -> dict[str, str]:
    """Environment variables for a Python process that uses these kernels.

    Args:
        folder: where to copy onnxruntime (takes a few seconds).
    """
    [package] = onnxruntime.__path__
    copied(Path(package), folder / "onnxruntime", lambda library: None)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {
        "LD_PRELOAD": str(build_answers(folder)),
        "PYTHONPATH": os.pathsep.join(paths),
        "NEO_CACHE_DIR": str(folder / "cache"),
    }
