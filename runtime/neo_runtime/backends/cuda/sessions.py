"""Sessions of onnxruntime's CUDA provider that share one copy of the weights on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neo_runtime.backends.cuda.weights import DeviceWeights
from neo_runtime.backends.failures import translated
from neo_runtime.errors import DeviceError, NeoError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from neo_runtime.backends.cuda.slots import Tensors
    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.folder import Bundle

__all__ = ["CudaSessions"]


class CudaSessions:
    """A bundle's sessions, made on first use. Callers hold the device's lock."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        ort: Any,
        *,
        source: Callable[[str], str | bytes],
        captures: bool,
        config: Mapping[str, str],
    ) -> None:
        """Copy the weights to the device.

        Args:
            bundle: an opened bundle exported for target `cuda`.
            device: the device to run on.
            ort: the module `onnxruntime`.
            source: returns the path or the serialized model of a graph.
            captures: capture decode steps as CUDA graphs.
            config: more session configuration entries.

        Raises:
            DeviceMemoryError: the weights do not fit into device memory.
        """
        self._ort, self._device, self._source, self._config = ort, device, source, config
        self.captures = captures
        self._weights: DeviceWeights | None = DeviceWeights(bundle, device, ort)
        self._open: dict[str, tuple[Any, dict[str, Any]]] = {}
        """By graph: the session, and the initializers over device memory that it uses."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the device."""
        return self._weights.nbytes if self._weights is not None else 0

    @property
    def weights(self) -> DeviceWeights:
        """The weights on the device.

        Raises:
            NeoError: the sessions are closed.
        """
        if self._weights is None:
            raise NeoError("the model is closed; call neo_runtime.load again")
        return self._weights

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._weights is None

    def get(self, graph: str) -> Any:
        """The `onnxruntime.InferenceSession` of "prefill", "decode" or "score"; made if needed.

        Raises:
            DeviceError: onnxruntime could not start its CUDA provider.
            DeviceMemoryError: the device has too little free memory.
            NeoError: the sessions are closed, or the graph cannot be loaded.
        """
        weights = self.weights
        if graph not in self._open:
            values = weights.initializers(graph)
            self._open[graph] = (self._make(graph, values), values)
        return self._open[graph][0]

    def _make(self, graph: str, values: Mapping[str, Any]) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; do not print them to stderr as well
        # With a memory pattern, each prompt length needs one block of its own size, which fragments
        # onnxruntime's arena: with growing prompts it held ten times what the longest needs.
        options.enable_mem_pattern = graph == "decode"
        # Prepacking would copy weights.
        settings = {"session.disable_prepacking": "1"} | dict(self._config)
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        for name, value in values.items():
            options.add_initializer(name, value)
        captures = self.captures and graph == "decode"
        providers = self._device.providers(capture=captures)
        with translated(self._ort, on_gpu=True):
            # enable_fallback would print the error and continue on the CPU.
            session = self._ort.InferenceSession(
                self._source(graph), options, providers=providers, enable_fallback=0
            )
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in session.get_providers():
            raise DeviceError(
                f"onnxruntime {self._ort.__version__} could not start its {wanted}: CUDA libraries "
                "are missing or of the wrong version; install those of CUDA 13 with pip install "
                "'neo-onnx[gpu]' (onnxruntime.preload_dlls() names those that it cannot find)"
            )
        return session

    def bind(self, graph: str, inputs: Tensors, outputs: Tensors) -> Any:
        """Bind device addresses to a graph's inputs and outputs.

        Each cache input is also bound as the matching `present` output, so that the graph updates
        the cache in place.
        """
        binding = self.get(graph).io_binding()
        name, index = self._device.name, self._device.index
        for tensor, (address, dtype, shape) in inputs.items():
            binding.bind_input(tensor, name, index, dtype, shape, address)
            if tensor.startswith("past_key_values."):
                present = "present." + tensor.removeprefix("past_key_values.")
                binding.bind_output(present, name, index, dtype, shape, address)
        for tensor, (address, dtype, shape) in outputs.items():
            binding.bind_output(tensor, name, index, dtype, shape, address)
        return binding

    def run(self, graph: str, binding: Any, graph_id: int = -1) -> None:
        """Queue a graph on the device's stream.

        Args:
            graph: "prefill", "decode" or "score".
            binding: a result of `bind` for this graph.
            graph_id: number of the CUDA graph to replay, or to capture on its first use; −1 to run
                without one.
        """
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        # The stream is the device's own, and callers synchronize before they read results.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with translated(self._ort, on_gpu=True):
            self.get(graph).run_with_iobinding(binding, options)

    def drop(self, graph: str) -> None:
        """Release a session; `get` makes a new one."""
        self._open.pop(graph, None)

    def close(self) -> None:
        """Release the sessions and the weights. All bindings must have been dropped."""
        self._open.clear()
        if self._weights is not None:
            self._weights.close()
            self._weights = None
