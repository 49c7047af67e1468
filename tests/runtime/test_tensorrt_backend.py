"""The TensorRT backend over host memory: a stand-in for the engine runs the same graph.

The plan's network is the bundle's prefill graph, so onnxruntime's CPU provider computes what an
engine would; contexts, profiles, addresses, aliases and captures are those of the backend.
"""

from __future__ import annotations

import ctypes
import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import onnxruntime as ort
import pytest
from helpers.host_device import HostDevice
from neo_runtime.backends.choice import Chosen
from neo_runtime.backends.tensorrt import TensorRTBackend
from neo_runtime.bundle import open_bundle
from neo_runtime.engine_record import EngineOptions, EngineRecord
from neo_runtime.errors import CacheLimitError, EngineError, NeoError
from neo_runtime.gpu import GpuFacts
from neo_runtime.model import Model
from neo_runtime.tensorrt_log import logger_of

if TYPE_CHECKING:
    from collections.abc import Iterator
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


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """The bundle with a plan of its own: links to the files, a folder of its own."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in tensorrt_bundle.iterdir():
        if file.is_file():
            (copy / file.name).hardlink_to(file)
    write_record(copy)
    return copy


@pytest.fixture
def tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(bundle)
    monkeypatch.setattr(
        "neo_runtime.backends.tensorrt.require_tensorrt", lambda: (fake, "tensorrt_rtx")
    )
    return fake


@pytest.fixture
def model(bundle: Path, tensorrt: FakeTensorRT) -> Iterator[Model]:
    opened = open_bundle(bundle)
    backend = TensorRTBackend(opened, HostDevice(), GPU, PLATFORM)
    with Model(opened, Chosen(backend, "tensorrt", None)) as model:
        yield model


@pytest.fixture(scope="module")
def cpu(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle) as model:
        yield model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 1, "top_p": 0.9},
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_same_texts(options: dict[str, Any], model: Model, cpu: Model) -> None:
    for prompts in (["Once upon a time"], ["The", "Tom and his dog went to the park", "A b c"]):
        found = model.generate(prompts, max_new_tokens=30, **options)
        expected = cpu.generate(prompts, max_new_tokens=30, **options)
        assert [c.text for c in found] == [c.text for c in expected]


def test_chunks_turns_and_the_last_position(model: Model, cpu: Model) -> None:
    end = model.manifest.max_length
    ids = np.random.default_rng(0).integers(0, 4096, (2, end))
    caches = [m.new_cache(2, end) for m in (model, cpu)]
    for turn in (
        [ids[0, :130], ids[1, :7]],  # in chunks of 48, ragged
        [ids[0, 130 : end - 7], ids[1, 7:40]],
        [ids[0, end - 7 : end - 2], ids[1, 40:80]],  # a padded row would pass the end
    ):
        found, expected = (
            m.prefill(cache, turn) for m, cache in zip((model, cpu), caches, strict=True)
        )
        np.testing.assert_allclose(found, expected, atol=2e-3)
    for step in range(2):
        tokens = [ids[0, end - 2 + step], ids[1, 80 + step]]
        found, expected = (
            m.decode(cache, tokens) for m, cache in zip((model, cpu), caches, strict=True)
        )
        np.testing.assert_allclose(found, expected, atol=2e-3)
    assert caches[0].lengths.tolist() == [end, 82]
    for cache in caches:
        cache.close()


def test_scores_in_pieces(model: Model, cpu: Model) -> None:
    ids = np.random.default_rng(1).integers(0, 4096, 77)
    np.testing.assert_allclose(model.logits(ids), cpu.logits(ids), atol=2e-3)


def test_two_contexts_and_a_captured_step(model: Model, tensorrt: FakeTensorRT) -> None:
    device = model._backend.device  # type: ignore[attr-defined]
    model.generate("Once", max_new_tokens=12)
    assert tensorrt.engine is not None
    assert [context.profile for context in tensorrt.engine.contexts] == [0, 1]
    assert (device.captures, device.replays, device.discards) == (1, 10, 1)
    assert not device.blocks


def test_more_rows_than_the_plan_takes(model: Model) -> None:
    with pytest.raises(CacheLimitError, match=r"built for 3; lower batch_size.*--max-batch"):
        model.generate(["Once"] * 4, max_new_tokens=2)
    assert len(model.generate(["Once"] * 4, max_new_tokens=2, batch_size=2)) == 4


def open_engine(bundle: Path) -> TensorRTBackend:
    return TensorRTBackend(open_bundle(bundle), HostDevice(), GPU, PLATFORM)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compute_capability": "9.0"}, "compute capability 9.0, NVIDIA Test has 8.9"),
        ({"gpu": "NVIDIA Other"}, "chosen on NVIDIA Other, this GPU is NVIDIA Test"),
        ({"version": "1.6.0.1"}, "built by TensorRT for RTX 1.6.0.1, here is 1.7.1.116"),
        ({"bundle_digest": "0" * 64}, "built from another bundle"),
        ({"platform": "win32-AMD64"}, "is for win32-AMD64"),
    ],
)
def test_a_plan_of_another_machine_never_runs(
    changes: dict[str, Any], reason: str, bundle: Path, tensorrt: FakeTensorRT
) -> None:
    write_record(bundle, **changes)
    with pytest.raises(EngineError, match=rf"{reason}.*build one here with neo-engine"):
        open_engine(bundle)
    assert tensorrt.engine is None


def test_damaged_refused_and_unfit_plans(bundle: Path, tensorrt: FakeTensorRT) -> None:
    (bundle / "engines" / "test.plan").write_bytes(b"b plan")
    with pytest.raises(EngineError, match="differs from its checksum"):
        open_engine(bundle)
    write_record(bundle)
    logger_of(tensorrt).log(1, "an error of an earlier model")
    tensorrt.refuses = True
    with pytest.raises(EngineError, match=r"refuses test\.plan, .*\(The engine .* 9\.0\);"):
        open_engine(bundle)
    tensorrt.refuses, tensorrt.aliased = False, False
    with pytest.raises(EngineError, match=r"does not update .* in place"):
        open_engine(bundle)


def test_nothing_works_after_closing(model: Model) -> None:
    cache = model.new_cache(1, 8)
    cache.close()
    backend = model._backend
    model.close()
    model.close()
    with pytest.raises(NeoError, match="closed"):
        backend.open_cache(1, 8)
