"""Every error that this project raises on purpose, as a tree.

    NeoError
    ├── BundleError            the folder is not a usable bundle
    │   ├── BundleDamagedError       a file is missing, truncated, or does not match its checksum
    │   └── BundleUnsupportedError   newer schema, unknown target, an onnxruntime that is too old
    ├── CheckpointError        the model given to `neo-export` cannot be exported
    ├── HubError               a model hub or its client library cannot be reached
    ├── RequestError           a prompt or an option cannot be honoured
    │   ├── ContextLengthError       it needs more positions than the model has
    │   └── GenerationConfigError    an option in a generation_config.json cannot be honoured
    ├── CacheLimitError        the key/value cache would exceed its limit
    ├── DeviceError            the requested GPU cannot be used
    │   └── DeviceMemoryError        it has no memory left
    ├── EngineError            a TensorRT plan cannot be built, or none fits this machine
    ├── HostMemoryError        the system is out of memory
    ├── DependencyError        a package is missing, or two packages exclude each other
    ├── OutputError            a result cannot be written to the requested place
    ├── StatisticsError        calibration statistics, or the text for them, cannot be used
    └── VerificationError      a bundle computes wrong results: a check failed, or NaN

A message says what was found, what was expected, and what to do. Commands print it as one
line on stderr and exit with status 2 (1 for a `VerificationError`, which is a result of the
command and not a wrong use of it).
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
    """The bundle is complete, but this installation cannot run it."""


class CheckpointError(NeoError):
    """The checkpoint cannot be exported."""


class HubError(NeoError):
    """A model hub, or its client library, cannot be reached."""


class RequestError(NeoError, ValueError):
    """A prompt or an option cannot be honoured."""


class ContextLengthError(RequestError):
    """The request needs more positions than the model has."""


class GenerationConfigError(RequestError):
    """A value of the bundle's `generation_config.json` that the request uses cannot be honoured.

    `problem` describes the value, without the advice on what a request can do about it.
    """

    problem: str = ""


class CacheLimitError(NeoError, MemoryError):
    """The key/value cache would be larger than its limit."""


class HostMemoryError(NeoError, MemoryError):
    """The system has no memory for weights, activations, or copies to a GPU."""


class DependencyError(NeoError, ImportError):
    """A package is missing, or two installed packages exclude each other."""


class DeviceError(NeoError):
    """A GPU cannot be used: there is none, the driver is missing or too old, or the GPU failed."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The GPU has too little free memory."""


class EngineError(NeoError):
    """A TensorRT plan cannot be built, or does not fit the machine."""


class OutputError(NeoError, OSError):
    """A result cannot be written."""


class StatisticsError(NeoError):
    """Calibration statistics are damaged or of another model, or the text yields none."""


class VerificationError(NeoError):
    """A bundle computes wrong results: a check failed, or its logits hold NaN or infinity."""
