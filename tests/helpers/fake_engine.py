"""A fake TensorRT module and engine over host memory, which runs the graph in onnxruntime.

A plan's network is the bundle's prefill graph, so onnxruntime's CPU provider computes what an
engine would. Contexts, profiles, addresses, aliases and captures are those of the backend.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from neo_runtime.bundle.engine_record import EngineOptions, EngineRecord
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.machine.gpu import GpuFacts

if TYPE_CHECKING:
    from pathlib import Path


GPU = GpuFacts(
    index=0,
    name="NVIDIA Test",
    compute_capability="8.9",
    memory_bytes=1 << 30,
    driver_cuda=(13, 0),
)
PLATFORM = "linux-x86_64"
OPTIONS = EngineOptions(opt_length=16, max_length=48, max_batch=3, max_logit_positions=20)
PLAN = b"a plan"
ACTIVATIONS = 1 << 12
"""Bytes."""


class FakeContext:
    """Runs the prefill graph on the memory at the bound addresses, within its profile's shapes."""

    def __init__(self, fake: FakeTensorRT, config: Any) -> None:
        self.fake, self.session, self.manifest = fake, fake.session, fake.manifest
        self.is_eager = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
        self.memory: tuple[int, int] | None = None
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile in (0, 1)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        options = self.fake.options
        least, most = {0: (1, 1), 1: (options.min_length, options.max_length)}[self.profile]
        fits = options.min_batch <= shape[0] <= options.max_batch
        if name in ("input_ids", "position_ids"):
            fits = fits and least <= shape[1] <= most
        elif name == "logit_positions":
            fits = fits and 1 <= shape[1] <= (
                1 if self.profile == 0 else options.max_logit_positions
            )
        return fits

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.profile >= 0
        assert size == ACTIVATIONS
        self.memory = (address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.fake.is_capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [t.name for t in self.manifest.graphs["prefill"].inputs if t.name not in self.shapes]

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory is not None
        binding = self.session.io_binding()
        kinds = {t.name: t.dtype for t in self.manifest.graphs["prefill"].inputs}
        for name, shape in self.shapes.items():
            address = self.addresses[name]
            binding.bind_input(name, "cpu", 0, np.dtype(kinds[name]).type, shape, address)
        rows = (*self.shapes["logit_positions"], self.manifest.model.vocab_size)
        binding.bind_output("logits", "cpu", 0, np.float32, rows, self.addresses["logits"])
        names = [t.name for t in self.manifest.graphs["prefill"].outputs if t.name != "logits"]
        for name in names:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        # The engine writes in place: past and present have the same address.
        for name, value in zip(names, binding.get_outputs()[1:], strict=True):
            past = "past_key_values." + name.removeprefix("present.")
            assert self.addresses[name] == self.addresses[past]
            found = value.numpy()
            assert found.shape == self.shapes[past]
            ctypes.memmove(self.addresses[past], found.ctypes.data, found.nbytes)
        self.runs += 1
        return True


class FakeEngine:
    device_memory_size_v2 = ACTIVATIONS

    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake, self.aliased = fake, fake.aliased
        graph = fake.manifest.graphs["prefill"]
        self.names = [t.name for t in (*graph.inputs, *graph.outputs)]
        self.contexts: list[FakeContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_aliased_input_tensor(self, name: str) -> str:
        past = "past_key_values." + name.removeprefix("present.")
        return past if self.aliased else ""

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(strategy=None)
        config.set_execution_context_allocation_strategy = partial(setattr, config, "strategy")
        return config

    def create_execution_context(self, config: Any) -> FakeContext:
        assert config.strategy == "user managed"
        self.contexts.append(FakeContext(self.fake, config))
        return self.contexts[-1]


class FakeTensorRT:
    """A fake of the module `tensorrt_rtx`."""

    __version__ = "1.7.1.116"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, bundle: Path, *, aliased: bool = True) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(
            str(bundle / "prefill.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.manifest, self.aliased = open_bundle(bundle).manifest, aliased
        self.engine: FakeEngine | None = None
        self.refuses = False
        self.options, self.is_capturable = OPTIONS, True
        self.runtime: Any = None
        severity = SimpleNamespace(ERROR=1, WARNING=2)
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.logger: Any = None

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        self.runtime = SimpleNamespace(
            deserialize_cuda_engine=self._deserialize, engine_host_code_allowed=False
        )
        return self.runtime

    def _deserialize(self, plan: bytes) -> FakeEngine | None:
        assert plan == PLAN
        if self.refuses:
            self.logger.log(1, "The engine cannot run on compute capability 9.0\n")
            self.logger.log(2, "a mere warning")
            return None
        self.engine = FakeEngine(self)
        return self.engine


def installed(fake: FakeTensorRT) -> Any:
    """A replacement for `tensorrt.plan.installed_modules`."""
    return lambda: {"tensorrt_rtx": fake}


def write_record(bundle: Path, **changes: Any) -> None:
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "test.plan").write_bytes(PLAN)
    facts: dict[str, Any] = {
        "file": "test.plan",
        "size": len(PLAN),
        "sha256": hashlib.sha256(PLAN).hexdigest(),
        "bundle_digest": open_bundle(bundle).manifest.digest,
        "flavour": "tensorrt_rtx",
        "version": FakeTensorRT.__version__,
        "compute_capability": "8.9",
        "gpu": None,
        "platform": PLATFORM,
        "options": OPTIONS,
        "build_seconds": 1.0,
    }
    record = EngineRecord(**(facts | changes))
    (bundle / "engines" / "test.json").write_text(record.to_json())


def with_plan(bundle: Path, copy: Path) -> Path:
    """A bundle folder with links to the files of `bundle` and a plan of its own."""
    copy.mkdir()
    for file in bundle.iterdir():
        if file.is_file():
            (copy / file.name).hardlink_to(file)
    write_record(copy)
    return copy
