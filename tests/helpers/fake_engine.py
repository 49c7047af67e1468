"""A stand-in for TensorRT's module and engine, over host memory: onnxruntime runs the same graph.

The plan's network is the bundle's prefill graph, so onnxruntime's CPU provider computes what an
engine would; contexts, profiles, addresses, aliases and captures are those of the backend.
"""

from __future__ import annotations

import ctypes
import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from neo_runtime.bundle import open_bundle
from neo_runtime.engine_record import EngineOptions, EngineRecord
from neo_runtime.gpu import GpuFacts

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.manifest import Manifest

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


class FakeContext:
    """Runs the prefill graph on what the addresses hold, within its profile."""

    def __init__(self, session: Any, manifest: Manifest) -> None:
        self.session, self.manifest = session, manifest
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile in (0, 1)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        most = {0: 1, 1: OPTIONS.max_length}[self.profile]
        fits = shape[0] <= OPTIONS.max_batch
        if name in ("input_ids", "position_ids"):
            fits = fits and 1 <= shape[1] <= most
        elif name == "logit_positions":
            fits = fits and 1 <= shape[1] <= (
                1 if self.profile == 0 else OPTIONS.max_logit_positions
            )
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [t.name for t in self.manifest.graphs["prefill"].inputs if t.name not in self.shapes]

    def execute_async_v3(self, stream: int) -> bool:
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
        # The engine writes in place: past and present are one address.
        for name, value in zip(names, binding.get_outputs()[1:], strict=True):
            past = "past_key_values." + name.removeprefix("present.")
            assert self.addresses[name] == self.addresses[past]
            found = value.numpy()
            assert found.shape == self.shapes[past]
            ctypes.memmove(self.addresses[past], found.ctypes.data, found.nbytes)
        self.runs += 1
        return True


class FakeEngine:
    def __init__(self, session: Any, manifest: Manifest, aliased: bool) -> None:
        self.session, self.manifest, self.aliased = session, manifest, aliased
        graph = manifest.graphs["prefill"]
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

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self.session, self.manifest))
        return self.contexts[-1]


class FakeTensorRT:
    """The module `tensorrt_rtx`."""

    __version__ = "1.7.1.116"

    def __init__(self, bundle: Path, *, aliased: bool = True) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(
            str(bundle / "prefill.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.manifest, self.aliased = open_bundle(bundle).manifest, aliased
        self.engine: FakeEngine | None = None
        self.refuses = False
        severity = SimpleNamespace(ERROR=1, WARNING=2)
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.logger: Any = None

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, plan: bytes) -> FakeEngine | None:
        assert plan == PLAN
        if self.refuses:
            self.logger.log(1, "The engine cannot run on compute capability 9.0\n")
            self.logger.log(2, "a mere warning")
            return None
        self.engine = FakeEngine(self.session, self.manifest, self.aliased)
        return self.engine


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
    """The bundle with a plan of its own: links to the files, a folder of its own."""
    copy.mkdir()
    for file in bundle.iterdir():
        if file.is_file():
            (copy / file.name).hardlink_to(file)
    write_record(copy)
    return copy
