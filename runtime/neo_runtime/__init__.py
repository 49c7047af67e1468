"""Generate text from a neo-onnx bundle with only numpy, onnxruntime and tokenizers.

    import neo_runtime

    with neo_runtime.load("build/demo-bundle") as model:
        print(model.generate("Once upon a time", max_new_tokens=50).text)

Importing this package imports none of the three: names are looked up when first used, and
onnxruntime is imported by `load`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_runtime.completion import Completion, Timings
    from neo_runtime.errors import (
        BundleDamagedError,
        BundleError,
        BundleUnsupportedError,
        CacheLimitError,
        ContextLengthError,
        DependencyError,
        DeviceError,
        DeviceMemoryError,
        EngineError,
        GenerationConfigError,
        NeoError,
        RequestError,
        VerificationError,
    )
    from neo_runtime.kv_cache import KVCache
    from neo_runtime.loading import load
    from neo_runtime.manifest import Manifest
    from neo_runtime.model import Model
    from neo_runtime.options import GenerationOptions
    from neo_runtime.pending import PendingCompletion
    from neo_runtime.prefix import Prefix
    from neo_runtime.sampling import Choice
    from neo_runtime.scheduler import Scheduler
    from neo_runtime.text_stream import TextStream
    from neo_runtime.tokenizer import Tokenizer

__all__ = [
    "BundleDamagedError",
    "BundleError",
    "BundleUnsupportedError",
    "CacheLimitError",
    "Choice",
    "Completion",
    "ContextLengthError",
    "DependencyError",
    "DeviceError",
    "DeviceMemoryError",
    "EngineError",
    "GenerationConfigError",
    "GenerationOptions",
    "KVCache",
    "Manifest",
    "Model",
    "NeoError",
    "PendingCompletion",
    "Prefix",
    "RequestError",
    "Scheduler",
    "TextStream",
    "Timings",
    "Tokenizer",
    "VerificationError",
    "load",
]

_MODULES = {
    "Choice": "sampling",
    "Completion": "completion",
    "GenerationOptions": "options",
    "KVCache": "kv_cache",
    "Manifest": "manifest",
    "Model": "model",
    "PendingCompletion": "pending",
    "Prefix": "prefix",
    "Scheduler": "scheduler",
    "TextStream": "text_stream",
    "Timings": "completion",
    "Tokenizer": "tokenizer",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
