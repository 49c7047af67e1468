"""Every error that this project raises on purpose, as a tree.

    NeoError
    ├── BundleError            the folder is not a usable bundle
    │   ├── BundleDamagedError       a file is missing, truncated, or differs from its checksum
    │   └── BundleUnsupportedError   newer schema, unknown target, an onnxruntime that is too old
    ├── CheckpointError        the model given to `neo-export` cannot be exported
    ├── HubError               a model hub or its client library cannot be reached
    ├── RequestError           a prompt or an option that cannot be honoured
    │   ├── ContextLengthError       more positions than the model has
    │   └── GenerationConfigError    such an option in a generation_config.json
    ├── CacheLimitError        the key/value cache would exceed the limit that was set
    ├── DeviceError            a GPU that was asked for cannot be used
    │   └── DeviceMemoryError        it has no memory left
    ├── EngineError            a TensorRT plan cannot be built, or none fits this machine
    ├── HostMemoryError        the system gives no memory
    ├── DependencyError        a package is missing, or two packages exclude each other
    ├── OutputError            a result cannot be written where it was asked for
    ├── StatisticsError        calibration statistics, or the text for them, cannot be used
    └── VerificationError      a bundle does not compute what it should: a check failed, or NaN

A message says what was found, what was expected, and what to do. Commands print it as one
line on stderr and exit with status 2 (1 for a `VerificationError`: a verdict, not a misuse).
"""

from __future__ import annotations

__all__ = [
    "BundleDamagedError",
    "BundleError",
    "BundleUnsupportedError",
    "CacheLimitError",
    "CheckpointError",
    "ContextLengthError",
    "DependencyError",
    "DeviceError",
    "DeviceMemoryError",
    "EngineError",
    "GenerationConfigError",
    "HostMemoryError",
    "HubError",
    "NeoError",
    "OutputError",
    "RequestError",
    "StatisticsError",
    "VerificationError",
]


class NeoError(Exception):
    """Base class of every error raised on purpose."""


class BundleError(NeoError):
    """The folder is not a usable bundle."""


class BundleDamagedError(BundleError):
    """A file of the bundle is missing, truncated or altered."""


class BundleUnsupportedError(BundleError):
    """The bundle is whole, but this installation cannot run it."""


class CheckpointError(NeoError):
    """The checkpoint cannot be exported."""


class HubError(NeoError):
    """A hub, or the client library for it, is out of reach."""


class RequestError(NeoError, ValueError):
    """A prompt or an option cannot be honoured."""


class ContextLengthError(RequestError):
    """The request needs more positions than the model has."""


class GenerationConfigError(RequestError):
    """The bundle's `generation_config.json` cannot be honoured, and the request did not replace it.

    `problem` is what is wrong with it, without what a request can do about it.
    """

    problem: str = ""


class CacheLimitError(NeoError, MemoryError):
    """The key/value cache would be larger than its limit."""


class HostMemoryError(NeoError, MemoryError):
    """The system gives no memory for weights, activations, or copies to a GPU."""


class DependencyError(NeoError, ImportError):
    """A package is missing, or two installed packages exclude each other."""


class DeviceError(NeoError):
    """A GPU cannot be used: none, no driver, too old a driver, or it failed."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The GPU has too little free memory."""


class EngineError(NeoError):
    """A TensorRT plan cannot be built, or does not fit the machine."""


class OutputError(NeoError, OSError):
    """A result cannot be written."""


class StatisticsError(NeoError):
    """Statistics of another model, damaged ones, or text that gives none."""


class VerificationError(NeoError):
    """A bundle does not compute what it should: a check failed, or its logits hold NaN."""
