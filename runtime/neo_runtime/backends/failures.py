"""What it means when onnxruntime fails: loading a graph, and running it."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import DeviceMemoryError, HostMemoryError, NeoError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["failure_kinds", "failure_reason", "lacks_memory", "translated"]

_OUT_OF_MEMORY = re.compile(
    r"CUDA.*out of memory"
    r"|Failed to allocate memory for requested buffer"
    r"|Available memory of \d+ is smaller than requested bytes"
    r"|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"
)
"""onnxruntime's arena does not say whose memory it asked for."""
_NO_HOST_MEMORY = re.compile(r"std::bad_alloc|[Cc]annot allocate memory|SystemError : 12\b")


def lacks_memory(error: Exception) -> bool:
    """Whether the system gave none: where no GPU is at work, the arena asks for nobody else's."""
    patterns = (_OUT_OF_MEMORY, _NO_HOST_MEMORY)
    return isinstance(error, MemoryError) or any(p.search(str(error)) for p in patterns)


def failure_kinds(ort: Any) -> tuple[type[Exception], ...]:
    """What onnxruntime raises."""
    state = ort.capi.onnxruntime_pybind11_state
    kinds = [kind for kind in vars(state).values() if isinstance(kind, type)]
    found = tuple(kind for kind in kinds if issubclass(kind, Exception))
    return (*found, RuntimeError, MemoryError)


@contextmanager
def translated(ort: Any, *, on_gpu: bool) -> Iterator[None]:
    """Turn what onnxruntime raises while running into this project's errors.

    Args:
        ort: the module onnxruntime.
        on_gpu: memory that it lacks is a GPU's.
    """
    try:
        yield
    except NeoError:
        raise
    except failure_kinds(ort) as error:
        reason = failure_reason(error)
        if "out of data bounds" in reason:
            raise RequestError(
                f"a token id or position lies outside the model's tables: {reason}"
            ) from error
        if on_gpu and _OUT_OF_MEMORY.search(str(error)):
            raise DeviceMemoryError(
                "the GPU has no memory left for activations; close other programs on it, lower "
                f"prefill_chunk or the batch, or export with --int4 ({reason})"
            ) from error
        if lacks_memory(error):
            raise HostMemoryError(
                f"onnxruntime failed: the system gives no memory for activations ({reason}); close "
                "other programs, raise this process's limit (ulimit -v, the container's), or lower "
                "prefill_chunk or the batch"
            ) from error
        raise NeoError(f"onnxruntime failed: {reason}") from error


def failure_reason(error: Exception) -> str:
    """The first line of onnxruntime's message, without its prefix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("[ONNXRuntimeError] : ")
