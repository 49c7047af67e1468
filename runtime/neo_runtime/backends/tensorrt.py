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
from neo_runtime.backends.device import Layout, move_rows
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
from neo_runtime.step_logits import StepLogits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from numpy.typing import NDArray

    from neo_runtime.backends.device import Device
    from neo_runtime.bundle import Bundle
    from neo_runtime.gpu import GpuFacts

__all__ = ["TensorRTBackend", "require_tensorrt"]

_ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


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
        self.manifest, self.device, self.lock = bundle.manifest, device, threading.RLock()
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
        self._runtime: Any = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"TensorRT {module.__version__} refuses {self.record.file}, although its record "
                "fits this machine; build it again with neo-engine"
            )
        self._check_aliases()
        self._contexts = {
            profile: self._context(profile) for profile in (DECODE_PROFILE, PREFILL_PROFILE)
        }
        self._closed = False

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
                "TensorRT cannot make an execution context: the GPU has no memory left for its "
                "activations; build a plan for shorter chunks (neo-engine --max-length)"
            )
        if not context.set_optimization_profile_async(profile, self.device.stream_handle):
            raise EngineError(f"{self.record.file} has no optimization profile {profile}")
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
                    f"{self.record.options.max_length} tokens"
                )
            if not context.set_tensor_address(name, address):
                raise NeoError(f"TensorRT takes no tensor {name}")
        missing = context.infer_shapes()
        if missing:
            raise NeoError(f"TensorRT wants shapes of {', '.join(missing)}")
        if not context.execute_async_v3(self.device.stream_handle):
            raise DeviceError("TensorRT failed to run the plan; its log is on stderr")

    def cache_bytes(self, batch: int, length: int) -> int:
        """See `Backend.cache_bytes`: a static cache is as long as the bundle allows."""
        model = self.manifest.model
        position = 2 * model.num_layers * model.num_heads * model.head_dim
        return position * _ITEM_SIZES[self.manifest.cache.dtype] * batch * self.manifest.max_length

    def open_cache(self, batch: int, length: int) -> CacheStore:
        """See `Backend.open_cache`."""
        most = self.record.options.max_batch
        if batch > most:
            raise CacheLimitError(
                f"{batch} sequences at once, but the plan {self.record.file} was built for {most}; "
                "lower batch_size, or build another one with neo-engine --max-batch"
            )
        return _TensorRTStore(self, batch)

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.score`."""
        options = self.record.options
        size = min(options.max_length, options.max_logit_positions)
        store = _TensorRTStore(self, 1)
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
            self._closed = True
            self._contexts.clear()
            self._engine = self._runtime = None
            self.device.close()

    def check_open(self) -> None:
        """Refuse to work after `close`."""
        if self._closed:
            raise NeoError("the model is closed; call neo_runtime.load again")


class _TensorRTStore(CacheStore):
    """Keys and values of some rows, and the captured decode step over them."""

    def __init__(self, backend: TensorRTBackend, batch: int) -> None:
        backend.check_open()
        model = backend.manifest.model
        self._backend, self._device, self._rows = backend, backend.device, batch
        self._item = _ITEM_SIZES[backend.manifest.cache.dtype]
        self._row_shape = (model.num_heads, backend.manifest.max_length, model.head_dim)
        cache, step = Layout(), Layout()
        for layer in range(model.num_layers):
            for part in ("key", "value"):
                cache.add(f"{layer}.{part}", None, (batch, *self._row_shape), self._item)
        for name in ("input_ids", "position_ids", "logit_positions"):
            step.add(name, np.int64, (batch, 1), 8)
        step.add("logits", np.float32, (batch, 1, model.vocab_size), 4)
        self._graph: Any = None
        with backend.lock:
            self._cache_block = self._device.allocate(cache.size)
            try:
                self._step_block = self._device.allocate(step.size)
            except BaseException:
                self._device.free(self._cache_block)
                raise
            # A slot that was never written is masked, and still multiplied by 0.
            self._device.zero(self._cache_block, cache.size)
            self._device.zero(self._step_block, step.size)
        self._cache = cache.tensors(self._cache_block)
        self._step_tensors = step.tensors(self._step_block)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self._is_open = True

    def _bound_cache(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        bound = {}
        for name, (address, _, shape) in self._cache.items():
            bound[f"past_key_values.{name}"] = bound[f"present.{name}"] = (address, shape)
        return bound

    def prefill(self, prompts: Sequence[NDArray[np.int64]], chunk: int) -> StepLogits:
        """See `CacheStore.prefill`."""
        chunk = min(chunk, self._backend.record.options.max_length)
        counts = np.array([len(prompt) for prompt in prompts])
        if (self.lengths + counts.max() > self._backend.manifest.max_length).any():
            # A padded row would write behind the end of its cache: rows go alone, unpadded.
            groups = [(row, [prompt]) for row, prompt in enumerate(prompts)]
        else:
            groups = [(0, list(prompts))]
        logits = np.empty((self.batch, self._backend.manifest.model.vocab_size), np.float32)
        for row, group in groups:
            logits[row : row + len(group)] = self._prefill(row, group, chunk)
        return StepLogits.at_hand(logits)

    def _prefill(
        self, first: int, prompts: Sequence[NDArray[np.int64]], chunk: int
    ) -> NDArray[np.float32]:
        """Logits of the last position of the rows from `first` on, float32 [rows, vocab]."""
        counts = np.array([len(prompt) for prompt in prompts])
        logits = np.empty((len(prompts), self._backend.manifest.model.vocab_size), np.float32)
        for start in range(0, int(counts.max()), chunk):
            left = np.clip(counts - start, 0, chunk)
            ids = np.zeros((len(prompts), int(left.max())), dtype=np.int64)
            for row, prompt in enumerate(prompts):
                ids[row, : left[row]] = prompt[start : start + left[row]]
            found = self.run_chunk(ids, np.maximum(left - 1, 0)[:, None], left, first)
            logits[left > 0] = found[left > 0, 0]
        return logits

    def run_chunk(
        self,
        ids: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
        counts: NDArray[np.int64] | None = None,
        first: int = 0,
    ) -> NDArray[np.float32]:
        """Append tokens to some rows, and give logits of some of them.

        Args:
            ids: [rows, sequence], padded on the right.
            logit_positions: [rows, m], indices among the new tokens.
            counts: [rows] tokens that are no padding; None for all.
            first: the store's row that `ids[0]` belongs to.

        Returns:
            float32 [rows, m, vocab].
        """
        backend, rows = self._backend, len(ids)
        counts = np.full(rows, ids.shape[1]) if counts is None else counts
        last = backend.manifest.max_length - 1
        chosen = slice(first, first + rows)
        positions = self.lengths[chosen, None] + np.arange(ids.shape[1])
        # Padding may not run past the table or the cache: it is fed, but never looked at.
        arrays = {
            "input_ids": np.ascontiguousarray(ids),
            "position_ids": np.minimum(positions, last),
            "logit_positions": np.ascontiguousarray(logit_positions),
        }
        shape = (*logit_positions.shape, backend.manifest.model.vocab_size)
        layout = Layout()
        for name, array in arrays.items():
            layout.add(name, np.int64, array.shape, 8)
        layout.add("logits", np.float32, shape, 4)
        logits = np.empty(shape, np.float32)
        with backend.lock:
            backend.check_open()
            block = self._device.allocate(layout.size)
            try:
                for name, array in arrays.items():
                    self._device.upload(block + layout.offset(name), array)
                tensors = {n: (a, s) for n, (a, _, s) in layout.tensors(block).items()}
                stride = self._item * int(np.prod(self._row_shape))
                cache = {
                    n: (a + first * stride, (rows, *s[1:]))
                    for n, (a, s) in self._bound_cache().items()
                }
                backend.queue(PREFILL_PROFILE, tensors | cache)
                self._device.download(logits, block + layout.offset("logits"))
                self._device.synchronize()
            finally:
                self._device.free(block)
        self.lengths[chosen] += counts
        return logits

    def decode(self, tokens: NDArray[np.int64]) -> StepLogits:
        """See `CacheStore.decode`: all rows, so that the captured step fits."""
        backend, batch = self._backend, self.batch
        ids = np.zeros((2, self._rows), dtype=np.int64)
        ids[0, :batch], ids[1, :batch] = tokens, self.lengths
        logits = np.empty((batch, 1, backend.manifest.model.vocab_size), np.float32)
        with backend.lock:
            backend.check_open()
            for index, name in enumerate(("input_ids", "position_ids")):
                self._device.upload(self._step_tensors[name][0], ids[index])
            if self._graph is None:
                self._queue_step()  # once without: kernels are chosen and loaded
                self._device.synchronize()
                self._graph = self._device.capture(self._queue_step)
            else:
                self._device.replay(self._graph)
            self._device.download(logits, self._step_tensors["logits"][0])
            self._device.synchronize()
        self.lengths += 1
        return StepLogits.at_hand(logits[:, 0])

    def _queue_step(self) -> None:
        tensors = {n: (a, s) for n, (a, _, s) in self._step_tensors.items()}
        self._backend.queue(DECODE_PROFILE, tensors | self._bound_cache())

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """See `CacheStore.reorder`."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if len(moved):
            sources = rows[moved]
            heads, length, head_dim = self._row_shape
            with self._backend.lock:
                move_rows(
                    self._device,
                    [address for address, _, _ in self._cache.values()],
                    (heads, length, head_dim * self._item),
                    int(self.lengths[sources].max()),
                    sources.tolist(),
                    moved.tolist(),
                )
        self.lengths = self.lengths[rows]

    def close(self) -> None:
        """See `CacheStore.close`."""
        if not self._is_open:
            return
        self._is_open = False
        with self._backend.lock:
            if self._graph is not None:
                self._device.discard(self._graph)
                self._graph = None
            self._device.free(self._step_block)
            self._device.free(self._cache_block)
