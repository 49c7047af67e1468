"""Translate the errors that onnxruntime raises when it loads or runs a graph."""

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
"""onnxruntime's arena does not say whether host or device memory ran out."""
_NO_HOST_MEMORY = re.compile(r"std::bad_alloc|[Cc]annot allocate memory|SystemError : 12\b")


def lacks_memory(error: Exception) -> bool:
    """Whether an error of an onnxruntime session on the CPU means that host memory ran out."""
    patterns = (_OUT_OF_MEMORY, _NO_HOST_MEMORY)
    return isinstance(error, MemoryError) or any(p.search(str(error)) for p in patterns)


def failure_kinds(ort: Any) -> tuple[type[Exception], ...]:
    """The exception types that onnxruntime raises.

    Args:
        ort: the module `onnxruntime`.
    """
    state = ort.capi.onnxruntime_pybind11_state
    kinds = [kind for kind in vars(state).values() if isinstance(kind, type)]
    found = tuple(kind for kind in kinds if issubclass(kind, Exception))
    return (*found, RuntimeError, MemoryError)


@contextmanager
def translated(ort: Any, *, on_gpu: bool) -> Iterator[None]:
    """Raise onnxruntime's errors as errors of this package.

    Args:
        ort: the module `onnxruntime`.
        on_gpu: whether the session runs on a GPU, so that its arena allocates GPU memory.

    Raises:
        RequestError: a token id or position is outside the model's tables.
        DeviceMemoryError: the GPU has too little free memory.
        HostMemoryError: the host has too little free memory.
        NeoError: any other failure.
    """
    try:
        yield
    except NeoError:
        raise
    except failure_kinds(ort) as error:
        reason = failure_reason(error)
        if "out of data bounds" in reason:
            raise RequestError(
                f"a token id or position is outside the model's tables ({reason}); use token ids "
                "below vocab_size and at most max_length positions"
            ) from error
        if on_gpu and _OUT_OF_MEMORY.search(str(error)):
            raise DeviceMemoryError(
                f"the GPU has too little free memory for activations ({reason}); close other "
                "programs that use it, lower prefill_chunk or the batch size, or export with --int4"
            ) from error
        if lacks_memory(error):
            raise HostMemoryError(
                f"the system has too little free memory for activations ({reason}); close other "
                "programs, raise the memory limit (ulimit -v, or the container's), or lower "
                "prefill_chunk or the batch size"
            ) from error
        raise NeoError(f"onnxruntime failed: {reason}") from error


def failure_reason(error: Exception) -> str:
    """The first line of an error's message, without onnxruntime's prefix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("[ONNXRuntimeError] : ")
