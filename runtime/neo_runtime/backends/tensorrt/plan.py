"""Choose a bundle's TensorRT plan, load it, and run its execution contexts.

A plan runs with the module that it was built by, `tensorrt` or `tensorrt_rtx`.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neo_runtime.backends.tensorrt.log import logger_of, messages_of
from neo_runtime.bundle.engine_record import (
    DECODE_PROFILE,
    ENGINES_FOLDER,
    FLAVOURS,
    Flavour,
    MachineFacts,
    choose_engine,
    read_records,
)
from neo_runtime.errors import (
    DependencyError,
    DeviceError,
    EngineError,
    NeoError,
    RequestError,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from neo_runtime.backends.device.base import Device
    from neo_runtime.bundle.engine_record import EngineRecord
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.machine.gpu import GpuFacts

__all__ = ["ChosenPlan", "LoadedPlan", "Tensors", "choose_plan", "installed_modules"]

Tensors = dict[str, tuple[int, tuple[int, ...]]]
"""Device address and shape of inputs and outputs, by name."""


def installed_modules() -> dict[Flavour, ModuleType]:
    """Those of the modules `tensorrt` and `tensorrt_rtx` that can be imported.

    Raises:
        DependencyError: neither can be imported.
    """
    found, reasons = {}, []
    for flavour in FLAVOURS:
        try:
            found[flavour] = importlib.import_module(flavour)
        except ImportError as error:
            reasons.append(f"{flavour}: {error}")
    if not found:
        raise DependencyError(
            f"TensorRT cannot be imported ({'; '.join(reasons)}); pip install "
            "'neo-onnx[tensorrt]', or 'neo-onnx[tensorrt-rtx]' if the plan is for TensorRT for RTX"
        )
    return found


@dataclass(frozen=True)
class ChosenPlan:
    """A plan that fits this machine, and the module that runs it."""

    path: Path
    record: EngineRecord
    module: Any


def choose_plan(bundle: Bundle, gpu: GpuFacts, platform: str) -> ChosenPlan:
    """Choose a bundle's plan by the records, without loading any plan.

    Args:
        bundle: an opened bundle exported for target `tensorrt`.
        gpu: the GPU to run on.
        platform: operating system and processor, such as "linux-x86_64".

    Raises:
        EngineError: no plan fits (the message gives the reason for each), or a record is damaged.
        DependencyError: TensorRT is not installed.
    """
    records = read_records(bundle.path)
    refusals = []
    for flavour, module in installed_modules().items():
        machine = MachineFacts(
            flavour=flavour,
            version=str(module.__version__),
            compute_capability=gpu.compute_capability,
            gpu=gpu.name,
            platform=platform,
        )
        try:
            record = choose_engine(records, machine, bundle.manifest.digest)
        except EngineError as error:
            refusals.append(error)
            continue
        return ChosenPlan(bundle.path / ENGINES_FOLDER / record.file, record, module)
    if len(refusals) == 1:
        raise refusals[0]
    raise EngineError("; or: ".join(str(refusal) for refusal in refusals))


class LoadedPlan:
    """A loaded engine, and the memory that its contexts share. Callers hold the device's lock."""

    def __init__(self, chosen: ChosenPlan, device: Device) -> None:
        """Load the engine, and allocate the memory for its activations.

        Raises:
            EngineError: the plan is damaged, or TensorRT rejects it.
            DeviceMemoryError: the activations do not fit into device memory.
        """
        self._trt, self.record, self._device = chosen.module, chosen.record, device
        plan = chosen.path.read_bytes()
        if hashlib.sha256(plan).hexdigest() != self.record.sha256:
            raise EngineError(
                f"{self.record.file} does not match its checksum; build it again with neo-engine"
            )
        device.select()
        self._messages()  # discard earlier ones
        self._runtime: Any = self._trt.Runtime(logger_of(self._trt))
        if self.record.options.version_compatible:
            # Such a plan contains TensorRT's lean runtime as code; the checksum above covers it.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"TensorRT {self._trt.__version__} rejected {self.record.file}, although its "
                f"record fits this machine ({self._messages()}); build it again with neo-engine"
            )
        self._check_aliases()
        self._memory_size = int(self._engine.device_memory_size_v2)
        # Only one context runs at a time, so all share one block for activations.
        self._memory = device.allocate(self._memory_size)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine is None

    def check_open(self) -> None:
        """Raise NeoError after `close`."""
        if self.is_closed:
            raise NeoError("the model is closed; call neo_runtime.load again")

    def close(self) -> None:
        """Release the engine and free the memory. Its contexts must have been dropped."""
        if not self.is_closed:
            self._engine = self._runtime = None
            self._device.free(self._memory)

    def _messages(self) -> str:
        """The errors that TensorRT logged since the last call, in one line."""
        return "; ".join(messages_of(self._trt, warnings=False)) or "it gives no reason"

    def _check_aliases(self) -> None:
        """Check that each `present` is aliased to its `past`, so that the cache is not copied."""
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

    def new_context(self, profile: int) -> Any:
        """An execution context for one of the two profiles.

        Raises:
            DeviceError: TensorRT cannot make one.
            EngineError: the plan has no such profile.
        """
        self.check_open()
        self._device.select()
        config = self._engine.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        specialization = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is not None and profile == DECODE_PROFILE:
            # Otherwise TensorRT for RTX replaces kernels later, which breaks a captured graph.
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        context = self._engine.create_execution_context(config)
        if context is None:
            raise DeviceError(
                f"TensorRT cannot create an execution context ({self._messages()}); free memory "
                "on the GPU, or build the plan again with neo-engine"
            )
        if not context.set_optimization_profile_async(profile, self._device.stream_handle):
            raise EngineError(
                f"{self.record.file} has no optimization profile {profile} ({self._messages()}); "
                "build it again with neo-engine"
            )
        self._device.synchronize()
        context.set_device_memory(self._memory, self._memory_size)
        return context

    def can_capture(self, context: Any) -> bool:
        """Whether a context, whose shapes are set, can be captured as a CUDA graph."""
        # Only TensorRT for RTX has the method, and only there it may be impossible.
        asked = getattr(context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._device.stream_handle))

    def queue(self, context: Any, tensors: Tensors) -> None:
        """Queue one execution.

        Args:
            context: a result of `new_context`.
            tensors: all inputs and outputs.

        Raises:
            RequestError: the plan was not built for these input shapes.
            DeviceError: TensorRT failed to run the plan.
            NeoError: TensorRT rejected an address, or an input is missing.
        """
        self._device.select()
        for name, (address, shape) in tensors.items():
            is_input = not name.startswith(("logits", "present."))
            if is_input and not context.set_input_shape(name, shape):
                options = self.record.options
                raise RequestError(
                    f"the plan {self.record.file} does not accept {name} of shape {list(shape)}: "
                    f"it was built for {options.min_batch} to {options.max_batch} rows and chunks "
                    f"of {options.min_length} to {options.max_length} tokens "
                    f"({self._messages()}); stay within these, or build another plan with "
                    "neo-engine"
                )
            if not context.set_tensor_address(name, address):
                raise NeoError(f"TensorRT rejected the address of {name}: {self._messages()}")
        missing = context.infer_shapes()
        if missing:
            raise NeoError(f"TensorRT needs the shapes of {', '.join(missing)}: {self._messages()}")
        if not context.execute_async_v3(self._device.stream_handle):
            raise DeviceError(f"TensorRT failed to run the plan: {self._messages()}")
