"""A TensorRT plan that is loaded: one engine, its contexts, one block for their activations.

Works with the modules `tensorrt` and `tensorrt_rtx`: the one that the plan was built by.
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
"""Address and shape of inputs and outputs, by name."""


def installed_modules() -> dict[Flavour, ModuleType]:
    """Of `tensorrt` and `tensorrt_rtx` those that can be imported.

    Raises:
        DependencyError: neither can.
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
            "'neo-onnx[tensorrt]', or 'neo-onnx[tensorrt-rtx]' where the plan is for TensorRT for "
            "RTX"
        )
    return found


@dataclass(frozen=True)
class ChosenPlan:
    """The plan of a bundle that fits the machine, and the module that runs it."""

    path: Path
    record: EngineRecord
    module: Any


def choose_plan(bundle: Bundle, gpu: GpuFacts, platform: str) -> ChosenPlan:
    """Choose by the records.

    Args:
        bundle: an opened bundle of the target `tensorrt`.
        gpu: where the plan would run.
        platform: operating system and processor, such as "linux-x86_64".

    Raises:
        EngineError: no plan fits, each with its reason.
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
    """See the module. Callers hold the device's lock."""

    def __init__(self, chosen: ChosenPlan, device: Device) -> None:
        """Load the engine, and allocate what its contexts need for activations.

        Raises:
            EngineError: the plan is damaged, or TensorRT refuses it.
            DeviceMemoryError: the activations do not fit.
        """
        self._trt, self.record, self._device = chosen.module, chosen.record, device
        plan = chosen.path.read_bytes()
        if hashlib.sha256(plan).hexdigest() != self.record.sha256:
            raise EngineError(
                f"{self.record.file} differs from its checksum; build it again with neo-engine"
            )
        device.select()
        self._messages()  # of whatever ran before
        self._runtime: Any = self._trt.Runtime(logger_of(self._trt))
        if self.record.options.version_compatible:
            # Such a plan brings TensorRT's lean runtime as code; its checksum is the record's.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"TensorRT {self._trt.__version__} refuses {self.record.file}, although its record "
                f"fits this machine ({self._messages()}); build it again with neo-engine"
            )
        self._check_aliases()
        self._memory_size = int(self._engine.device_memory_size_v2)
        # One context runs at a time, so all of them share the memory for activations.
        self._memory = device.allocate(self._memory_size)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine is None

    def check_open(self) -> None:
        """Refuse to work after `close`."""
        if self.is_closed:
            raise NeoError("the model is closed; call neo_runtime.load again")

    def close(self) -> None:
        """Let go of the engine; contexts of it must be gone."""
        if not self.is_closed:
            self._engine = self._runtime = None
            self._device.free(self._memory)

    def _messages(self) -> str:
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
            # TensorRT for RTX would exchange kernels in mid-run, under a captured graph.
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        context = self._engine.create_execution_context(config)
        if context is None:
            raise DeviceError(f"TensorRT cannot make an execution context ({self._messages()})")
        if not context.set_optimization_profile_async(profile, self._device.stream_handle):
            raise EngineError(
                f"{self.record.file} has no optimization profile {profile} ({self._messages()})"
            )
        self._device.synchronize()
        context.set_device_memory(self._memory, self._memory_size)
        return context

    def can_capture(self, context: Any) -> bool:
        """Whether TensorRT lets the context's work be captured; its shapes are set."""
        # Only TensorRT for RTX may have to say no.
        asked = getattr(context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._device.stream_handle))

    def queue(self, context: Any, tensors: Tensors) -> None:
        """Queue one execution.

        Args:
            context: of `new_context`.
            tensors: every input and output.

        Raises:
            NeoError: TensorRT refuses the shapes, or fails.
        """
        self._device.select()
        for name, (address, shape) in tensors.items():
            is_input = not name.startswith(("logits", "present."))
            if is_input and not context.set_input_shape(name, shape):
                options = self.record.options
                raise RequestError(
                    f"the plan {self.record.file} does not take {name} of shape {list(shape)}; "
                    f"it was built for {options.min_batch} to {options.max_batch} rows and chunks "
                    f"of {options.min_length} to {options.max_length} tokens ({self._messages()})"
                )
            if not context.set_tensor_address(name, address):
                raise NeoError(f"TensorRT rejected the address of {name}: {self._messages()}")
        missing = context.infer_shapes()
        if missing:
            raise NeoError(f"TensorRT needs the shapes of {', '.join(missing)}: {self._messages()}")
        if not context.execute_async_v3(self._device.stream_handle):
            raise DeviceError(f"TensorRT failed to run the plan: {self._messages()}")
