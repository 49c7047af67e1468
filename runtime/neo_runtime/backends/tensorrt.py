"""A TensorRT plan of the bundle: one engine, one copy of the weights, two execution contexts.

    context of DECODE_PROFILE      one token a row; captured once a store as a CUDA graph, replayed
    context of PREFILL_PROFILE     chunks of prompts of all rows together, and scoring

Keys and values are [batch, heads, max_length, head_dim]; past and present are one address, which
is what the engine's aliased tensors ask for. `position_ids[:, 0]` says where a row's new tokens go,
so rows of any lengths go through together, padded on the right.

Works with the modules `tensorrt` and `tensorrt_rtx`, whichever is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.backends.base import Backend, CacheStore
from neo_runtime.backends.leftovers import Leftovers
from neo_runtime.backends.tensorrt_store import ITEM_SIZES, TensorRTStore
from neo_runtime.engine_record import (
    DECODE_PROFILE,
    ENGINES_FOLDER,
    PREFILL_PROFILE,
    EngineRecord,
    MachineFacts,
    choose_engine,
    read_records,
)
from neo_runtime.errors import (
    CacheLimitError,
    DependencyError,
    DeviceError,
    EngineError,
    NeoError,
    RequestError,
)
from neo_runtime.tensorrt_log import logger_of, messages_of

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from neo_runtime.backends.device import Device
    from neo_runtime.bundle import Bundle
    from neo_runtime.gpu import GpuFacts

__all__ = ["TensorRTBackend", "require_tensorrt"]


def require_tensorrt() -> tuple[ModuleType, str]:
    """The module and its name: `tensorrt`, or else `tensorrt_rtx`.

    Raises:
        DependencyError: neither can be imported.
    """
    reasons = []
    for flavour in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(flavour), flavour
        except ImportError as error:
            reasons.append(f"{flavour}: {error}")
    raise DependencyError(
        f"TensorRT cannot be imported ({'; '.join(reasons)}); pip install 'neo-onnx[tensorrt]', or "
        "tensorrt-rtx-cu13 where the plan is for TensorRT for RTX"
    )


class TensorRTBackend(Backend):
    """One call runs at a time: there is one stream."""

    def __init__(self, bundle: Bundle, device: Device, gpu: GpuFacts, platform: str) -> None:
        """Choose a plan by its record, and load it.

        Args:
            bundle: an opened bundle of the target `tensorrt`.
            device: where to run; `close` closes it, too.
            gpu: what the device is.
            platform: operating system and processor, such as "linux-x86_64".

        Raises:
            EngineError: no plan fits, each with its reason, or the one that does is damaged.
            DependencyError: TensorRT is not installed.
        """
        module, flavour = require_tensorrt()
        self._trt: Any = module
        self.manifest, self.device, self.lock = bundle.manifest, device, threading.Lock()
        self.leftovers = Leftovers(self.lock)
        machine = MachineFacts(
            flavour="tensorrt" if flavour == "tensorrt" else "tensorrt_rtx",
            version=str(module.__version__),
            compute_capability=gpu.compute_capability,
            gpu=gpu.name,
            platform=platform,
        )
        records = read_records(bundle.path)
        self.record: EngineRecord = choose_engine(records, machine, bundle.manifest.digest)
        """Of the plan that runs."""
        self.default_chunk = self.record.options.max_length
        plan = (bundle.path / ENGINES_FOLDER / self.record.file).read_bytes()
        if hashlib.sha256(plan).hexdigest() != self.record.sha256:
            raise EngineError(
                f"{self.record.file} differs from its checksum; build it again with neo-engine"
            )
        self._words()  # of whatever ran before
        self._runtime: Any = self._trt.Runtime(logger_of(module))
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"TensorRT {module.__version__} refuses {self.record.file}, although its record "
                f"fits this machine ({self._words()}); build it again with neo-engine"
            )
        self._check_aliases()
        self._contexts = {
            profile: self._context(profile) for profile in (DECODE_PROFILE, PREFILL_PROFILE)
        }
        self._closed = False

    def _words(self) -> str:
        """The errors that TensorRT has told since it was last asked."""
        return "; ".join(messages_of(self._trt, warnings=False)) or "it gives no reason"

    def _check_aliases(self) -> None:
        """Past and present of each layer must be one address, or the cache would be copied."""
        engine = self._engine
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if not name.startswith("present."):
                continue
            past = "past_key_values." + name.removeprefix("present.")
            if engine.get_aliased_input_tensor(name) != past:
                raise EngineError(
                    f"{self.record.file} does not update {past} in place; build it again with "
                    "neo-engine from a bundle of --target tensorrt"
                )

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise DeviceError(
                f"TensorRT cannot make an execution context ({self._words()}); if the GPU has no "
                "memory left for its activations, build a plan for shorter chunks (neo-engine "
                "--max-length)"
            )
        if not context.set_optimization_profile_async(profile, self.device.stream_handle):
            raise EngineError(
                f"{self.record.file} has no optimization profile {profile} ({self._words()})"
            )
        self.device.synchronize()
        return context

    def queue(self, profile: int, tensors: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """Queue one execution.

        Args:
            profile: whose context.
            tensors: address and shape of every input and output, by name.

        Raises:
            NeoError: TensorRT refuses the shapes, or fails.
        """
        context = self._contexts[profile]
        for name, (address, shape) in tensors.items():
            is_input = not name.startswith(("logits", "present."))
            if is_input and not context.set_input_shape(name, shape):
                raise RequestError(
                    f"the plan {self.record.file} does not take {name} of shape {list(shape)}; "
                    f"it was built for up to {self.record.options.max_batch} rows and chunks of "
                    f"{self.record.options.max_length} tokens ({self._words()})"
                )
            if not context.set_tensor_address(name, address):
                raise NeoError(f"TensorRT takes no tensor {name}: {self._words()}")
        missing = context.infer_shapes()
        if missing:
            raise NeoError(f"TensorRT wants shapes of {', '.join(missing)}: {self._words()}")
        if not context.execute_async_v3(self.device.stream_handle):
            raise DeviceError(f"TensorRT failed to run the plan: {self._words()}")

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`: a static cache is as long as the bundle allows."""
        model = self.manifest.model
        position = 2 * model.num_layers * model.num_heads * model.head_dim
        return position * ITEM_SIZES[self.manifest.cache.dtype] * batch * self.manifest.max_length

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""
        most = self.record.options.max_batch
        if batch > most:
            raise CacheLimitError(
                f"{batch} sequences at once, but the plan {self.record.file} was built for {most}; "
                "lower batch_size, or build another one with neo-engine --max-batch"
            )
        return TensorRTStore(self, batch)

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.score`."""
        options = self.record.options
        size = min(options.max_length, options.max_logit_positions)
        store = TensorRTStore(self, 1)
        try:
            found = [
                store.run_chunk(
                    ids[None, start : start + size],
                    np.arange(len(ids[start : start + size]), dtype=np.int64)[None],
                )[0]
                for start in range(0, len(ids), size)
            ]
        finally:
            store.close()
        return np.concatenate(found)

    def close(self) -> None:
        """See `Backend.close`."""
        with self.lock:
            if self._closed:
                return
            self.leftovers.clear()
            self._closed = True
            self._contexts.clear()
            self._engine = self._runtime = None
            self.device.close()
        self.leftovers.settle()  # of a cache that was closed meanwhile

    def check_open(self) -> None:
        """Refuse to work after `close`."""
        if self._closed:
            raise NeoError("the model is closed; call neo_runtime.load again")
