"""The installed TensorRT: `tensorrt`, or `tensorrt_rtx` for RTX GPUs, which have the same API."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from neo_runtime.backends.tensorrt.log import logger_of, messages_of
from neo_runtime.bundle.engine_record import FLAVOURS, PRODUCTS
from neo_runtime.bundle.engine_record import Flavour as Name
from neo_runtime.errors import DependencyError
from neo_runtime.machine.installation import version_numbers

__all__ = ["Flavour", "find_flavour"]

_OLDEST = {"tensorrt": "11.0", "tensorrt_rtx": "1.7"}
"""TensorRT 10 lacks TensorScatter; the builders of TensorRT for RTX 1.5 and 1.6 crash on it."""
_ADVICE = "has Int64 binding"
"""A warning about every int64 input of every graph. The bundle's inputs are int64 by design."""
_INSTALL = {
    "tensorrt": "pip install 'neo-onnx[tensorrt]' (on the machine with the GPU)",
    "tensorrt_rtx": "pip install 'neo-onnx[tensorrt-rtx]' (needs no GPU to build)",
}


@dataclass(frozen=True)
class Flavour:
    """An installed TensorRT module."""

    name: Name
    module: Any
    """The imported module."""

    @property
    def version(self) -> str:
        """The module's `__version__`."""
        return str(self.module.__version__)

    @property
    def product(self) -> str:
        """NVIDIA's name of the product."""
        return PRODUCTS[self.name]

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds without a GPU, for a named compute capability."""
        return self.name == "tensorrt_rtx"

    @property
    def logger(self) -> Any:
        """The process-wide logger: TensorRT keeps the first one it is given."""
        return logger_of(self.module)

    def messages(self) -> list[str]:
        """Messages logged since the last call: errors, then warnings."""
        return [message for message in messages_of(self.module) if _ADVICE not in message]


def find_flavour(asked: str | None = None) -> Flavour:
    """Import the installed TensorRT module.

    Args:
        asked: one of `FLAVOURS`; None if only one of them is installed.

    Raises:
        DependencyError: the module is not installed, cannot be loaded or is too old; or both are
            installed and `asked` is None.
    """
    found = [name for name in FLAVOURS if importlib.util.find_spec(name) is not None]
    if asked is not None:
        name = next(flavour for flavour in FLAVOURS if flavour == asked)
        if name not in found:
            raise DependencyError(f"{PRODUCTS[name]} is not installed; {_INSTALL[name]}")
    elif not found:
        ways = ", or ".join(_INSTALL.values())
        raise DependencyError(f"neither TensorRT nor TensorRT for RTX is installed; {ways}")
    elif len(found) > 1:
        raise DependencyError(
            "both tensorrt and tensorrt_rtx are installed, but a plan runs under only one of them; "
            "choose with --flavour tensorrt or --flavour tensorrt_rtx"
        )
    else:
        name = found[0]
    return _load(name)


def _load(name: Name) -> Flavour:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a missing shared library raises different types
        raise DependencyError(
            f"{PRODUCTS[name]} is installed but cannot be loaded ({error}); "
            f"install it again: {_INSTALL[name]}"
        ) from error
    version = str(getattr(module, "__version__", ""))
    if not version or not hasattr(module, "OnnxParser"):
        raise DependencyError(
            f"the installed {name} is incomplete; install it again: {_INSTALL[name]}"
        )
    if version_numbers(version) < version_numbers(_OLDEST[name]):
        raise DependencyError(
            f"{PRODUCTS[name]} {version} is installed, expected {_OLDEST[name]} or newer; "
            f"{_INSTALL[name]}"
        )
    return Flavour(name, module)
