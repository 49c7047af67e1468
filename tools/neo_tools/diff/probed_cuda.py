"""As `probed_backend`, on a GPU: the CUDA backend's own loop over graphs that show their places."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from neo_export.comparison.probed import probed_model, probed_values
from neo_runtime.backends.cuda.backend import CudaBackend

from neo_tools.diff.cached_path import trace_scored

if TYPE_CHECKING:
    from collections.abc import Callable

    from neo_export.comparison.trace import Trace
    from neo_export.quantize.kv_cache import CacheSteps
    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.folder import Bundle
    from numpy.typing import NDArray

    from neo_tools.diff.probed_backend import Sink

__all__ = ["ProbedCudaBackend"]


class ProbedCudaBackend(CudaBackend):
    """Every call runs its kernels one by one, and `sink` gets the values, [1, S, width] each."""

    captures = False
    """What is shown leaves the device at every step."""

    def __init__(self, bundle: Bundle, device: Device) -> None:
        # A graph from memory has no folder; onnxruntime looks for its weights before it takes ours.
        folder = {"session.model_external_initializers_file_folder_path": str(bundle.path)}
        super().__init__(bundle, device, folder)
        self.cache_steps: CacheSteps | None = None
        """There are no int8 caches here."""
        self._names = probed_values(self.manifest)
        self.sink: Sink = lambda values: None

    def _source(self) -> Callable[[str], bytes]:
        """See `CudaBackend`."""
        return partial(probed_model, self._bundle.path, self.manifest)

    def run_bound(self, graph: str, binding: Any) -> None:
        """See `CudaBackend.run_bound`."""
        # Behind those that the store has bound; anew each time, for their shape is the call's.
        for name in self._names:
            binding.bind_output(name)
        super().run_bound(graph, binding)
        self.device.synchronize()
        outputs = binding.get_outputs()[-len(self._names) :]
        self.sink({n: o.numpy() for n, o in zip(self._names, outputs, strict=True)})

    def score_trace(self, ids: NDArray[Any]) -> Trace:
        """Places and logits of every position, by the score graph."""
        return trace_scored(self, ids)
