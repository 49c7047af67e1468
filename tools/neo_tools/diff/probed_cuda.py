"""Like `probed_backend`, on a GPU: the CUDA backend's own loop over graphs with probed places."""

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
    """Calls are not captured as CUDA graphs; `sink` gets the values, [1, S, width] each."""

    captures = False
    """False, because the probed values are copied from the device at every step."""

    def __init__(self, bundle: Bundle, device: Device) -> None:
        # A graph from memory has no folder, and onnxruntime looks for its weights before it takes
        # ours.
        folder = {"session.model_external_initializers_file_folder_path": str(bundle.path)}
        super().__init__(bundle, device, folder)
        self.cache_steps: CacheSteps | None = None
        """None: this backend has no int8 caches."""
        self._names = probed_values(self.manifest)
        self.sink: Sink = lambda values: None

    def _source(self) -> Callable[[str], bytes]:
        """See `CudaBackend`."""
        return partial(probed_model, self._bundle.path, self.manifest)

    def run_bound(self, graph: str, binding: Any) -> None:
        """See `CudaBackend.run_bound`."""
        # Bound after the store's outputs, and at each call, because their shapes differ.
        for name in self._names:
            binding.bind_output(name)
        super().run_bound(graph, binding)
        self.device.synchronize()
        outputs = binding.get_outputs()[-len(self._names) :]
        self.sink({n: o.numpy() for n, o in zip(self._names, outputs, strict=True)})

    def score_trace(self, ids: NDArray[Any]) -> Trace:
        """Places and logits of every position, from the score graph."""
        return trace_scored(self, ids)
