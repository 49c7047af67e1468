"""The backend that runs the bundle, and the one that shows its places."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_runtime import Model
    from neo_runtime.bundle.folder import Bundle

    from neo_tools.diff.probed_backend import Probed

__all__ = ["Engine", "open_probed_backend", "shown_elsewhere", "why_not_shown"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One of the runtime's backends on this machine."""

    backend: str = "cpu"
    """"cpu", "cuda" or "tensorrt"."""
    device: int = 0
    threads: int
    """Threads within an operator on a CPU."""
    runs_on: str = "CPU"
    """Description for reports: a GPU's name, a plan."""

    @classmethod
    def of(cls, model: Model, device: int, threads: int) -> Engine:
        """The engine of a model that was loaded with this device and these threads."""
        return cls(backend=model.backend, device=device, threads=threads, runs_on=model.runs_on)


def why_not_shown(bundle: Bundle, engine: Engine) -> str | None:
    """The reason why no engine here can show a bundle's places; None if one can."""
    if engine.backend != "cuda" and bundle.manifest.cache.dtype == "bfloat16":
        return (
            "a plan shows no values inside, and onnxruntime has no kernels for bfloat16 on the CPU"
        )
    return None


def shown_elsewhere(bundle: Bundle, engine: Engine) -> str | None:
    """A warning if a bundle's places come from another engine than its logits; otherwise None."""
    reason = why_not_shown(bundle, engine)
    if reason is not None:
        return f"places are not looked at: {reason}"
    if engine.backend == "tensorrt":
        return (
            "a plan shows no places: what is said of them is of its graph, run by onnxruntime on "
            "the CPU"
        )
    return None


@contextmanager
def open_probed_backend(bundle: Bundle, engine: Engine) -> Iterator[Probed]:
    """Open a backend with probed graphs: on the GPU if the CUDA backend runs the bundle.

    A TensorRT plan does not show its places; the graph that it was built from runs on the CPU
    instead.

    Raises:
        NeoError: the backend cannot be opened.
    """
    backend: Probed
    if engine.backend == "cuda":
        from neo_runtime.backends.device.nvidia import CudaDevice
        from neo_runtime.closable import closed_on_error

        from neo_tools.diff.probed_cuda import ProbedCudaBackend

        with closed_on_error(CudaDevice(engine.device)) as device:
            backend = ProbedCudaBackend(bundle, device)
    else:
        from neo_tools.diff.probed_backend import ProbedBackend

        backend = ProbedBackend(bundle, threads=engine.threads)
    try:
        yield backend
    finally:
        backend.close()
