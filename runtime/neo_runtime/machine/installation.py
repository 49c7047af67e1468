"""Find out which onnxruntime is installed, and whether it can be used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from typing import TYPE_CHECKING

from neo_runtime.errors import DependencyError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["install_command", "onnxruntime_is_installed", "require_onnxruntime", "version_numbers"]

_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)
"""Distributions that all install the same package, `onnxruntime`."""
_GPU_FORM = {"cpu": "gpu", "bench": "bench-gpu", "diff": "diff-gpu"}
"""Extras of neo-onnx that install onnxruntime → those that install onnxruntime-gpu instead."""
_GPU_EXTRAS = (*_GPU_FORM.values(), "gpu-check")


def require_onnxruntime() -> ModuleType:
    """Import onnxruntime, with its telemetry turned off unless the environment says otherwise.

    Raises:
        DependencyError: onnxruntime is missing or cannot be loaded, or several of its wheels are
            installed, which overwrite each other's files.
    """
    found = _installed()
    if len(found) > 1:
        extra = "gpu" if "onnxruntime-gpu" in found else "cpu"
        raise DependencyError(
            f"{' and '.join(found)} are installed together and overwrite each other's files: "
            f"remove all of them (pip uninstall {' '.join(found)}), then install one "
            f"(pip install 'neo-onnx[{extra}]')"
        )
    repair = f"pip install --force-reinstall {found[0] if found else 'onnxruntime'}"
    # Unless this is set before the import, the official wheels report usage and create an
    # identifier for it in the home folder, which a library for private text must not do.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        if error.name == "onnxruntime":
            raise DependencyError(
                "onnxruntime is not installed: pip install 'neo-onnx[cpu]', or 'neo-onnx[gpu]' "
                "for NVIDIA GPUs"
            ) from error
        raise DependencyError(
            f"onnxruntime is installed but cannot be loaded ({error}); reinstall it: {repair}"
        ) from error
    if not hasattr(module, "InferenceSession"):  # pip leaves this when it removes one of two wheels
        raise DependencyError(
            "the folder onnxruntime in site-packages is incomplete, as after removing one of two "
            f"of its wheels; install it again: {repair}"
        )
    return module


def install_command(extras: str) -> str:
    """The shell command that installs extras of neo-onnx, without a second onnxruntime wheel.

    Args:
        extras: names separated by commas. If onnxruntime-gpu is installed, extras that install the
            CPU wheel are replaced by their GPU variants.
    """
    installed, names = _installed(), extras.split(",")
    if "onnxruntime-gpu" in installed:
        names = [_GPU_FORM.get(name, name) for name in names]
    brought = {"onnxruntime" for name in names if name in _GPU_FORM}
    brought |= {"onnxruntime-gpu" for name in names if name in _GPU_EXTRAS}
    others = [name for name in installed if brought and name not in brought]
    first = f"pip uninstall {' '.join(others)}, then " if others else ""
    return f"{first}pip install 'neo-onnx[{','.join(names)}]'"


def onnxruntime_is_installed() -> bool:
    """Whether any onnxruntime is installed, usable or not."""
    return bool(_installed()) or importlib.util.find_spec("onnxruntime") is not None


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: "1.23.0rc1" → (1, 23).

    Raises:
        ValueError: `version` does not start with a number.
    """
    match = re.match(r"\d+(?:\.\d+)*", version)
    if match is None:
        raise ValueError(f"{version!r} is not a version")
    numbers = [int(part) for part in match.group().split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _installed() -> list[str]:
    found = []
    for name in _DISTRIBUTIONS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found
