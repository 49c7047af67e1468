"""Export targets: a file for each kind of machine, with the passes for its graphs."""

from __future__ import annotations

from neo_runtime.errors import RequestError

from neo_export.targets.context import PassContext
from neo_export.targets.cpu import CPU
from neo_export.targets.cuda import CUDA
from neo_export.targets.portable import PORTABLE
from neo_export.targets.quantization import Quantization
from neo_export.targets.target import Target
from neo_export.targets.tensorrt import TENSORRT

__all__ = ["TARGETS", "PassContext", "Quantization", "Target", "target_named"]

TARGETS: dict[str, Target] = {target.name: target for target in (CPU, CUDA, PORTABLE, TENSORRT)}


def target_named(name: str) -> Target:
    """The target of this name.

    Raises:
        RequestError: there is no such target.
    """
    if name not in TARGETS:
        raise RequestError(f"target {name!r} is unknown, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
