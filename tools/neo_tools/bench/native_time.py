"""Measures the time in onnxruntime's native code, call by call; the rest of a step is Python."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["native_seconds"]


@contextmanager
def native_seconds() -> Iterator[list[float]]:
    """Collect the seconds of every native run of onnxruntime, one number per call.

    The wrapper is on onnxruntime's extension class, below its Python code, so all Python code
    counts as Python, however the runtime calls a session.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state

    native = onnxruntime_pybind11_state.InferenceSession
    spent: list[float] = []
    kept = {
        name: getattr(native, name) for name in ("run", "run_with_iobinding", "run_with_ort_values")
    }

    def timed(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            started = perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                spent.append(perf_counter() - started)

        return call

    for name, function in kept.items():
        setattr(native, name, timed(function))
    try:
        yield spent
    finally:
        for name, function in kept.items():
            setattr(native, name, function)
