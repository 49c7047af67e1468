"""The TensorRT backend over host memory: `helpers.fake_engine` in the engine's place."""

from __future__ import annotations

import ctypes
import gc
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.beginnings import assert_beginnings_hold
from helpers.cropping import assert_crops_hold
from helpers.fake_engine import (
    GPU,
    OPTIONS,
    PLATFORM,
    FakeTensorRT,
    installed,
    with_plan,
    write_record,
)
from helpers.forced import assert_forced_tokens_fit
from helpers.guessing import assert_guesses_change_nothing
from helpers.host_device import HostDevice
from helpers.joining import assert_rows_join
from helpers.models import ODD_CONFIGS, Reference, make_checkpoint
from helpers.parity import assert_parity
from helpers.prefixes import assert_prefixes_hold
from helpers.running import relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.choice import Chosen
from neo_runtime.backends.device.locks import new_lock
from neo_runtime.backends.tensorrt import plan as tensorrt_plan
from neo_runtime.backends.tensorrt.backend import TensorRTBackend
from neo_runtime.backends.tensorrt.log import logger_of
from neo_runtime.backends.tensorrt.store import TensorRTStore
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import (
    CacheLimitError,
    DeviceError,
    DeviceMemoryError,
    EngineError,
    NeoError,
    RequestError,
)
from neo_runtime.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return with_plan(tensorrt_bundle, tmp_path / "bundle")


@pytest.fixture
def tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(bundle)
    monkeypatch.setattr("neo_runtime.backends.tensorrt.plan.installed_modules", installed(fake))
    return fake


def open_engine(bundle: Path) -> TensorRTBackend:
    return TensorRTBackend(open_bundle(bundle), HostDevice(), GPU, PLATFORM)


@contextmanager
def open_model(
    bundle: Path, device: HostDevice | None = None
) -> Iterator[tuple[Model, HostDevice]]:
    opened, device = open_bundle(bundle), device or HostDevice()
    backend = TensorRTBackend(opened, device, GPU, PLATFORM)
    with Model(opened, Chosen(backend, "tensorrt", None)) as model:
        yield model, device


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


def test_rows_join_and_leave(model: Model) -> None:
    assert_rows_join(model, TOLERANCES["fp32"].logits)


def test_a_row_that_joins_is_clean(model: Model) -> None:
    """Masked positions may pass through a GPU's kernels: what was there must not."""
    with model.new_cache(2, 16) as cache:
        model.prefill(cache, [[1, 2], [3, 4]])
        cache.reorder([0])
        cache.extend(1)
        store = cache.store
        assert isinstance(store, TensorRTStore)
        for address, shape in store._buffers.cache.values():
            held = np.empty(shape, np.float32)
            store._device.download(held, address)
            assert held[0].any()
            assert not held[1].any()


def test_rows_begin_with_another_cache(model: Model) -> None:
    assert_prefixes_hold(model, TOLERANCES["fp32"].logits)
    assert_beginnings_hold(model, TOLERANCES["fp32"].logits)


def test_positions_are_taken_away(model: Model) -> None:
    assert_crops_hold(model, TOLERANCES["fp32"].logits)


def test_guesses_change_nothing(model: Model) -> None:
    assert_guesses_change_nothing(model, 1e-4)


def test_forced_tokens_fit(model: Model) -> None:
    assert_forced_tokens_fit(model, 1e-4)


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
        assert relative_l2(found, expected).max() <= TOLERANCES["fp32"].logits
    for step in range(2):
        tokens = [ids[0, end - 2 + step], ids[1, 80 + step]]
        found, expected = (
            m.decode(cache, tokens) for m, cache in zip((model, cpu), caches, strict=True)
        )
        assert relative_l2(found, expected).max() <= TOLERANCES["fp32"].logits
    assert caches[0].lengths.tolist() == [end, 82]
    for cache in caches:
        cache.close()


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_checkpoints_that_stand_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tests/gpu` has it on a GPU: every position against PyTorch, by every kind of call."""
    config = ODD_CONFIGS[name]
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "exported", ExportOptions(target="tensorrt"))
    bundle = with_plan(tmp_path / "exported", tmp_path / "bundle")
    fake = FakeTensorRT(bundle)
    module = "neo_runtime.backends.tensorrt.plan.installed_modules"
    monkeypatch.setattr(module, installed(fake))
    opened = open_bundle(bundle)
    backend = TensorRTBackend(opened, HostDevice(), GPU, PLATFORM)
    with Model(opened, Chosen(backend, "tensorrt", None)) as model:
        assert_parity(model, Reference(source), config, TOLERANCES["fp32"].logits)


def test_scores_in_pieces(model: Model, cpu: Model) -> None:
    ids = np.random.default_rng(1).integers(0, 4096, 77)
    assert relative_l2(model.logits(ids), cpu.logits(ids)).max() <= TOLERANCES["fp32"].logits


def test_contexts_and_captured_steps(model: Model, tensorrt: FakeTensorRT) -> None:
    """A context for each captured graph; all share one block for activations; buffers come back."""
    device = model._backend.device  # type: ignore[attr-defined]
    held = device.in_use
    for _ in range(3):
        model.generate("Once", max_new_tokens=12)
    model.generate(["Once", "The"], max_new_tokens=12)
    assert tensorrt.engine is not None
    contexts = tensorrt.engine.contexts
    assert [(context.profile, context.is_eager) for context in contexts] == [
        (1, None),
        (0, "eager"),
        (0, "eager"),
    ]
    assert len({context.memory for context in contexts}) == 1
    assert (device.captures, device.replays) == (2, 2 + 3 * 11 - 3 + 10)
    buffers = sum(found.nbytes for found in model._backend._steps.items)  # type: ignore[attr-defined]
    assert device.in_use - held == buffers
    model.close()
    assert device.discards == 2
    assert not device.blocks


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    bundle: Path, tensorrt: FakeTensorRT, cpu: Model, caplog: pytest.LogCaptureFixture
) -> None:
    expected = cpu.generate("Once", max_new_tokens=12).text
    tensorrt.is_capturable = False
    with open_model(bundle) as (model, device):
        assert model.generate("Once", max_new_tokens=12).text == expected
        assert (device.captures, device.replays) == (0, 0)

    class Failing(HostDevice):
        def capture(self, queue: Callable[[], None]) -> Any:
            raise DeviceError("CUDA failed to end a capture")

    tensorrt.is_capturable = True
    with open_model(bundle, Failing()) as (model, device):
        assert model.generate("Once", max_new_tokens=12).text == expected
    assert "without a CUDA graph: CUDA failed to end a capture" in caplog.text


def test_a_capture_holds_the_locks_of_other_models(bundle: Path, tensorrt: FakeTensorRT) -> None:
    """What this thread frees of theirs meanwhile would spoil it."""
    other = new_lock()
    held = []

    class Watching(HostDevice):
        def capture(self, queue: Callable[[], None]) -> Any:
            held.append(other.locked())
            return super().capture(queue)

    with open_model(bundle, Watching()) as (model, _):
        model.generate("Once", max_new_tokens=3)
    assert held == [True]
    assert not other.locked()


def test_nothing_of_an_earlier_request_is_left(model: Model) -> None:
    """A masked slot is still multiplied by 0, and what was there may not have been finite."""
    cache = model.new_cache(1, 8)
    buffers = model._backend._steps.items[0]  # type: ignore[attr-defined]
    for address, shape in buffers.cache.values():
        count = int(np.prod(shape))
        array = (ctypes.c_float * count).from_address(address)
        np.ctypeslib.as_array(array)[:] = np.nan
    cache.close()
    assert np.isfinite(model.prefill(model.new_cache(1, 8), [[1, 2, 3]])).all()


def test_shorter_chunks_than_the_plan_takes(
    bundle: Path, tensorrt: FakeTensorRT, cpu: Model
) -> None:
    tensorrt.options = replace(OPTIONS, min_length=16)
    write_record(bundle, options=tensorrt.options)
    ids = np.random.default_rng(3).integers(0, 4096, 100)
    with open_model(bundle) as (model, _):
        for count in (1, 3, 50, 100):  # 50: 48 and 2
            error = relative_l2(model.logits(ids[:count]), cpu.logits(ids[:count]))
            assert error.max() <= TOLERANCES["fp32"].logits
        found = model.generate(["The", "Tom and his dog"], max_new_tokens=20)
        expected = cpu.generate(["The", "Tom and his dog"], max_new_tokens=20)
        assert [c.text for c in found] == [c.text for c in expected]
        end = model.manifest.max_length
        cache = model.new_cache(1, end)
        model.prefill(cache, [ids[np.arange(end - 5) % 100]])
        with pytest.raises(RequestError, match=r"1 to 3 rows and chunks of 16 to 48 tokens"):
            model.prefill(cache, [ids[:3]])  # no room for padding


def test_fewer_rows_than_the_plan_takes(bundle: Path, tensorrt: FakeTensorRT) -> None:
    tensorrt.options = replace(OPTIONS, min_batch=2)
    write_record(bundle, options=tensorrt.options)
    with open_model(bundle) as (model, _):
        assert len(model.generate(["Once", "The"], max_new_tokens=2)) == 2
        for call in (partial(model.generate, "Once", max_new_tokens=2), partial(model.logits, [1])):
            with pytest.raises(CacheLimitError, match=r"for at least 2;.*--min-batch 1"):
                call()


def test_code_inside_of_a_plan_is_allowed_where_it_is_needed(
    bundle: Path, tensorrt: FakeTensorRT
) -> None:
    open_engine(bundle).close()
    assert tensorrt.runtime.engine_host_code_allowed is False
    write_record(bundle, options=replace(OPTIONS, version_compatible=True))
    open_engine(bundle).close()
    assert tensorrt.runtime.engine_host_code_allowed is True


def test_the_module_is_that_of_the_plan(
    bundle: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both are installed."""
    other = FakeTensorRT(bundle)
    other.__version__ = "11.4.0"
    modules = {"tensorrt": other, "tensorrt_rtx": tensorrt}
    monkeypatch.setattr(tensorrt_plan, "installed_modules", lambda: modules)
    open_engine(bundle).close()
    assert (other.engine, tensorrt.engine is None) == (None, False)
    write_record(bundle, gpu="NVIDIA Other")
    with pytest.raises(EngineError, match=r"this is TensorRT\).*; or: .*chosen on NVIDIA Other"):
        open_engine(bundle)


def test_more_rows_than_the_plan_takes(model: Model) -> None:
    with pytest.raises(CacheLimitError, match=r"for at most 3; lower batch_size.*--max-batch"):
        model.generate(["Once"] * 4, max_new_tokens=2, batch_size=4)
    assert len(model.generate(["Once"] * 4, max_new_tokens=2)) == 4, "in batches that fit"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compute_capability": "9.0"}, "compute capability 9.0, but NVIDIA Test has 8.9"),
        ({"gpu": "NVIDIA Other"}, "chosen on NVIDIA Other, this GPU is NVIDIA Test"),
        ({"version": "1.6.0.1"}, "built by TensorRT for RTX 1.6.0.1, this is 1.7.1.116"),
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
    with pytest.raises(EngineError, match="does not match its checksum"):
        open_engine(bundle)
    write_record(bundle)
    logger_of(tensorrt).log(1, "an error of an earlier model")
    tensorrt.refuses = True
    with pytest.raises(EngineError, match=r"rejected test\.plan, .*\(The engine .* 9\.0\);"):
        open_engine(bundle)
    tensorrt.refuses, tensorrt.aliased = False, False
    with pytest.raises(EngineError, match=r"does not update .* in place"):
        open_engine(bundle)


def test_a_cache_that_is_garbage_gives_its_memory_back(model: Model) -> None:
    backend = model._backend
    assert isinstance(backend, TensorRTBackend)
    device = backend.device
    assert isinstance(device, HostDevice)

    def use() -> int:
        cache = model.new_cache(1, 8)
        model.prefill(cache, [[1]])
        model.decode(cache, [1])
        del cache
        gc.collect()
        return device.in_use

    assert len({use() for _ in range(3)}) == 1
    cache = model.new_cache(1, 8)
    with backend.lock:  # as in the middle of a step, when nothing may be freed
        del cache
        gc.collect()
        assert len(backend._steps._taken) == 1
    model.new_cache(1, 8).close()
    assert backend._steps._taken == []


def test_memory_is_freed_before_it_is_refused(bundle: Path, tensorrt: FakeTensorRT) -> None:
    with open_model(bundle) as (model, device):
        model.generate(["Once", "The"], max_new_tokens=2)
        device.capacity = device.in_use + 100
        model.generate("Once", max_new_tokens=2)  # idle buffers make room, here and for a chunk
        with pytest.raises(DeviceMemoryError):
            model.generate(["Once"] * 3, max_new_tokens=2)
        device.capacity = None


def test_a_model_that_is_garbage_gives_everything_back(
    bundle: Path, tensorrt: FakeTensorRT
) -> None:
    device = HostDevice()
    opened = open_bundle(bundle)
    model = Model(opened, Chosen(TensorRTBackend(opened, device, GPU, PLATFORM), "tensorrt", None))
    model.generate("Once", max_new_tokens=3)
    del model
    gc.collect()
    assert device.closed


def test_a_closed_store_does_not_touch_the_buffers_of_the_next(model: Model) -> None:
    """A reference to a store may outlive its cache, whose buffers the next cache takes."""
    with model.new_cache(1, 8) as cache:
        model.prefill(cache, [[1, 2]])
        store = cache.store
    for call in (
        partial(store.decode, np.array([3])),
        partial(store.score, np.array([3]), np.empty((1, model.manifest.model.vocab_size), "f")),
        partial(store.extend, 0),
    ):
        with pytest.raises(NeoError, match="the cache is closed"):
            call()
    store.close()


def test_nothing_works_after_closing(model: Model) -> None:
    cache, other = model.new_cache(2, 8), model.new_cache(1, 8)
    model.prefill(cache, [[1], [2]])
    other.close()
    backend = model._backend
    assert isinstance(backend, TensorRTBackend)
    device = backend.device
    assert isinstance(device, HostDevice)
    model.close()
    model.close()
    assert not device.closed
    for call in (
        partial(backend.open_cache, 1, 8),
        partial(cache.reorder, [1, 0]),
        partial(model.prefill, cache, [[1], [2]]),
        partial(model.decode, cache, [1, 1]),
    ):
        with pytest.raises(NeoError, match="closed"):
            call()
    cache.close()
    assert device.closed


def test_every_call_of_the_engine_is_for_its_device(
    bundle: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's own device is the one that it used last, for another model."""
    calls: list[str] = []

    def noted(owner: Any, name: str) -> None:
        kept = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return kept(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    device = HostDevice()
    monkeypatch.setattr(device, "select", lambda: calls.append("select"))
    noted(tensorrt_plan.LoadedPlan, "_messages")  # the first thing when an engine is loaded
    opened = open_bundle(bundle)
    with Model(
        opened, Chosen(TensorRTBackend(opened, device, GPU, PLATFORM), "tensorrt", None)
    ) as model:
        assert calls[:2] == ["select", "_messages"]
        for name in ("new_context", "queue"):
            calls.clear()
            noted(tensorrt_plan.LoadedPlan, name)
            assert model.generate("Tom", max_new_tokens=3).text
            assert calls[calls.index(name) + 1] == "select"
