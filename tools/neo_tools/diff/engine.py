"""What runs the bundle, and what shows its places there."""

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
    """Of one operator on a CPU."""
    runs_on: str = "CPU"
    """For the reader: a GPU's name, a plan."""

    @classmethod
    def of(cls, model: Model, device: int, threads: int) -> Engine:
        """What a model that was loaded with these runs on."""
        return cls(backend=model.backend, device=device, threads=threads, runs_on=model.runs_on)


def why_not_shown(bundle: Bundle, engine: Engine) -> str | None:
    """Why no engine here shows a bundle's places, or None."""
    if engine.backend != "cuda" and bundle.manifest.cache.dtype == "bfloat16":
        return (
            "a plan shows no values inside, and onnxruntime has no kernels for bfloat16 on the CPU"
        )
    return None


def shown_elsewhere(bundle: Bundle, engine: Engine) -> str | None:
    """A warning where a bundle's places are not looked at on the engine that gives its logits."""
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
    """Graphs that show their places, on the GPU where that is what runs the CUDA form.

    A plan shows nothing inside; the graph that it was built from runs on the CPU in its place.

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
