"""Generate text from a neo-onnx bundle with only numpy, onnxruntime and tokenizers.

    import neo_runtime

    with neo_runtime.load("build/demo-bundle") as model:
        print(model.generate("Once upon a time", max_new_tokens=50).text)

Importing this package imports none of the three: names are looked up on first use, and `load`
imports onnxruntime.

Its parts; each imports only itself and those above it:

errors         every error raised on purpose
closable       objects that a `with` block closes
forks          what runs first in a forked child
json_input     parsing of JSON from users
machine        processors, memory, GPUs and installed packages
bundle         a bundle's folder: its manifest, and whether it is complete
options        names and values of generation options
text           text and token ids
backends       graphs, and KV caches in the memory of an engine
cache          the public KV cache, the prefix cache, and the account of their memory
cached_model   a bundle as a function of token ids
sampling       from logits to the next token
generation     continuations of prompts, in batches and as streams
request_model  validation of requests
model          the public `Model`
loading        `load`
scheduling     continuous batching: requests that join a running batch
command        `neo-generate` and `neo-verify`
entry          entry points of both commands
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_runtime.bundle.manifest import Manifest
    from neo_runtime.cache.kv_cache import KVCache
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
        HostMemoryError,
        NeoError,
        RequestError,
        VerificationError,
    )
    from neo_runtime.generation.completion import Completion, Timings
    from neo_runtime.generation.draft_model import DraftModel
    from neo_runtime.generation.drafting import Drafter, PromptLookup
    from neo_runtime.generation.prefix import Prefix
    from neo_runtime.generation.text_stream import Piece, TextStream
    from neo_runtime.loading import load
    from neo_runtime.model import Model
    from neo_runtime.options.generation_options import GenerationOptions
    from neo_runtime.options.grammar import Grammar
    from neo_runtime.sampling.choice import Choice
    from neo_runtime.scheduling.pending import PendingCompletion
    from neo_runtime.scheduling.scheduler import Scheduler
    from neo_runtime.text.tokenizer import Tokenizer

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
    "DraftModel",
    "Drafter",
    "EngineError",
    "GenerationConfigError",
    "GenerationOptions",
    "Grammar",
    "HostMemoryError",
    "KVCache",
    "Manifest",
    "Model",
    "NeoError",
    "PendingCompletion",
    "Piece",
    "Prefix",
    "PromptLookup",
    "RequestError",
    "Scheduler",
    "TextStream",
    "Timings",
    "Tokenizer",
    "VerificationError",
    "load",
]

_MODULES = {
    "Choice": "sampling.choice",
    "Completion": "generation.completion",
    "DraftModel": "generation.draft_model",
    "Drafter": "generation.drafting",
    "GenerationOptions": "options.generation_options",
    "Grammar": "options.grammar",
    "KVCache": "cache.kv_cache",
    "Manifest": "bundle.manifest",
    "Model": "model",
    "PendingCompletion": "scheduling.pending",
    "Piece": "generation.text_stream",
    "Prefix": "generation.prefix",
    "PromptLookup": "generation.drafting",
    "Scheduler": "scheduling.scheduler",
    "TextStream": "generation.text_stream",
    "Timings": "generation.completion",
    "Tokenizer": "text.tokenizer",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` (PEP 562); `__version__` is the distribution's."""
    if name == "__version__":
        from importlib.metadata import version

        return version("neo-onnx")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
