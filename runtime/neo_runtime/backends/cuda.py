"""The bundle's graphs in onnxruntime's CUDA provider: weights once, buffers bound once.

Written for a GPU, and by its `Device` independent of one: the same code runs on the CPU provider
over host memory, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import Backend
from neo_runtime.backends.device_slots import ELEMENT_TYPES, ITEM_SIZES, SlotPool
from neo_runtime.backends.device_store import DeviceStore
from neo_runtime.backends.device_weights import DeviceWeights
from neo_runtime.backends.leftovers import Leftovers
from neo_runtime.backends.sessions import translated
from neo_runtime.errors import BundleUnsupportedError, DeviceError, NeoError
from neo_runtime.installation import require_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from neo_runtime.backends.base import CacheStore
    from neo_runtime.backends.device import Device
    from neo_runtime.backends.device_slots import Slot, Tensors
    from neo_runtime.bundle import Bundle
    from neo_runtime.manifest import Manifest

__all__ = ["CudaBackend", "why_not_cuda"]

_LENGTHS = 256
"""Caches are made in steps of so many positions, so that slots and their graphs are used again."""
_SCORED = 512
"""Positions that are scored in one call: their logits are 100 MB."""


def why_not_cuda(manifest: Manifest) -> str | None:
    """Why this backend cannot run a bundle, or None where it can."""
    if manifest.target != "cuda":
        return f"it was exported for {manifest.target}; export with --target cuda"
    if manifest.cache.dtype not in ELEMENT_TYPES:
        return f"it keeps keys and values in {manifest.cache.dtype}; export without --kv-cache"
    if manifest.cache.layout != "in_place":
        return (
            f"its heads of {manifest.model.head_dim} do not suit the fused attention (multiples "
            "of 8), without which there is no cache that is updated in place"
        )
    return None


class CudaBackend(Backend):
    """Sessions are made when first used. One call runs at a time: there is one stream."""

    default_chunk = 2048

    def __init__(
        self, bundle: Bundle, device: Device, session_config: Mapping[str, str] | None = None
    ) -> None:
        """Copy the weights to the device.

        Args:
            bundle: an opened bundle of the target `cuda`.
            device: where to run; `close` closes it, too.
            session_config: more session configuration entries.

        Raises:
            BundleUnsupportedError: the bundle is for another backend.
            DeviceMemoryError: the weights do not fit.
        """
        reason = why_not_cuda(bundle.manifest)
        if reason is not None:
            raise BundleUnsupportedError(f"{bundle.path} does not run on backend cuda: {reason}")
        self._ort: Any = require_onnxruntime()
        self._bundle, self.manifest, self.device = bundle, bundle.manifest, device
        self._session_config = dict(session_config or {})
        self.lock = threading.Lock()
        """Held while the device works: copies and kernels of one call stay together, and nothing is
        allocated or freed while kernels are captured."""
        self._leftovers = Leftovers(self.lock)
        self.slots = SlotPool(self.manifest, device)
        self._weights: DeviceWeights | None = DeviceWeights(bundle, device, self._ort)
        self._kept: list[Any] = []
        self._sessions: dict[str, Any] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the device."""
        return self._weights.nbytes if self._weights is not None else 0

    def session(self, graph: str) -> Any:
        """The `onnxruntime.InferenceSession` of "prefill", "decode" or "score".

        The caller holds the lock.
        """
        if self._weights is None:
            raise NeoError("the model is closed; call neo_runtime.load again")
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph, self._weights)
        return self._sessions[graph]

    def graph_source(self, graph: str) -> str | bytes:
        """Path or serialized model of a graph, for onnxruntime."""
        return str(self._bundle.graph(graph))

    def captures(self, graph: str) -> bool:
        """Whether a graph's kernels are recorded in a CUDA graph and replayed."""
        return graph == "decode"

    def _open(self, graph: str, weights: DeviceWeights) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised; no second account on stderr
        # A kernel's own copy of a weight would be a second one.
        settings = {"session.disable_prepacking": "1"} | self._session_config
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        values = weights.initializers(graph)
        for name, value in values.items():
            options.add_initializer(name, value)
        self._kept.append(values)
        providers = self.device.providers(capture=self.captures(graph))
        with translated(self._ort):
            source = self.graph_source(graph)
            session = self._ort.InferenceSession(source, options, providers=providers)
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in session.get_providers():
            raise DeviceError(
                f"onnxruntime {self._ort.__version__} could not start its {wanted} (it would have "
                "run on the CPU instead): CUDA's libraries are missing or of another version; pip "
                "install 'neo-onnx[gpu]' brings those of CUDA 13, and onnxruntime.preload_dlls() "
                "names what it cannot find"
            )
        return session

    def prepare(self) -> None:
        """See `Backend.prepare`."""
        with self.lock:
            for graph in ("prefill", "decode"):
                self.session(graph)

    def bind(self, graph: str, inputs: Tensors, outputs: Tensors) -> Any:
        """Bind addresses to a graph's inputs and outputs; the cache is its own output.

        The caller holds the lock.
        """
        binding = self.session(graph).io_binding()
        name, index = self.device.name, self.device.index
        for tensor, (address, dtype, shape) in inputs.items():
            binding.bind_input(tensor, name, index, dtype, shape, address)
            if tensor.startswith("past_key_values."):
                present = "present." + tensor.removeprefix("past_key_values.")
                binding.bind_output(present, name, index, dtype, shape, address)
        for tensor, (address, dtype, shape) in outputs.items():
            binding.bind_output(tensor, name, index, dtype, shape, address)
        return binding

    def run(self, graph: str, binding: Any, graph_id: int | None) -> None:
        """Compute, in the device's stream. The caller holds the lock.

        Args:
            graph: whose session runs.
            binding: of `bind`.
            graph_id: replay (at first: capture) the CUDA graph of this number; None: run kernels.
        """
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1" if graph_id is None else str(graph_id))
        # The stream is ours, and what reads the results waits for it.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with self.translated():
            self.session(graph).run_with_iobinding(binding, options)

    def translated(self) -> AbstractContextManager[None]:
        """Turn what onnxruntime raises while running into this project's errors."""
        return translated(self._ort)

    def _capacity(self, length: int) -> int:
        """Positions of the buffers for sequences of up to `length`; at least two.

        With one position every decode step would look like a first prompt.
        """
        rounded = -(-length // _LENGTHS) * _LENGTHS
        return max(2, min(rounded, self.manifest.max_length))

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`."""
        model = self.manifest.model
        position = 2 * model.num_layers * model.num_heads * model.head_dim
        size = ITEM_SIZES[self.manifest.cache.dtype]
        return position * size * batch * self._capacity(length)

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""
        return DeviceStore(self, batch, self._capacity(length))

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.score`."""
        vocab_size, count = self.manifest.model.vocab_size, len(ids)
        logits = np.empty((count, vocab_size), np.float32)
        size = min(count, _SCORED)
        store = DeviceStore(self, 1, self._capacity(count))
        try:
            with self._block(4 * size * vocab_size) as block:
                for start in range(0, count, size):
                    end = min(start + size, count)
                    store.run_chunk(
                        "score",
                        0,
                        np.ascontiguousarray(ids[None, start:end]),
                        np.ones((1, end), dtype=np.int64),
                        np.arange(start, end, dtype=np.int64)[None],
                        {"logits": (block, np.float32, (1, end - start, vocab_size))},
                    )
                    with self.lock:
                        self.device.download(logits[start:end], block)
                        self.device.synchronize()
        finally:
            store.close()
        return logits

    @contextmanager
    def _block(self, size: int) -> Iterator[int]:
        """Device memory for the time of a call."""
        with self.lock:
            block = self.device.allocate(size)
        try:
            yield block
        finally:
            with self.lock:
                self.device.free(block)

    def take_slot(self, batch: int, length: int) -> Slot:
        """Buffers for a store.

        Raises:
            DeviceMemoryError: the device has no room.
        """
        with self.lock:
            self._leftovers.clear()
            return self.slots.take(batch, length)

    def give_back(self, slot: Slot) -> None:
        """Take a slot from a store that is closed, or garbage."""
        self._leftovers.leave(partial(self._keep, slot))

    def _keep(self, slot: Slot) -> None:
        self.slots.give(slot)
        self._close_device()

    def close(self) -> None:
        """See `Backend.close`. Caches that are open keep their memory until they are closed."""
        with self.lock:
            if self._weights is None:
                return
            self._leftovers.clear()
            self.slots.close()
            self._sessions.clear()
            self._kept.clear()
            self._weights.close()
            self._weights = None
            self._close_device()
        self._leftovers.settle()  # of a cache that was closed meanwhile

    def _close_device(self) -> None:
        if self._weights is None and self.slots.is_empty:
            self.device.close()
