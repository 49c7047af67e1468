"""The TensorRT backend over host memory: `helpers.fake_engine` in the engine's place."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.fake_engine import GPU, PLATFORM, FakeTensorRT, with_plan, write_record
from helpers.host_device import HostDevice
from helpers.models import ODD_CONFIGS, Reference, make_checkpoint
from helpers.parity import assert_parity
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.choice import Chosen
from neo_runtime.backends.tensorrt import TensorRTBackend
from neo_runtime.bundle import open_bundle
from neo_runtime.errors import CacheLimitError, EngineError, NeoError
from neo_runtime.model import Model
from neo_runtime.tensorrt_log import logger_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return with_plan(tensorrt_bundle, tmp_path / "bundle")


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
    module = "neo_runtime.backends.tensorrt.require_tensorrt"
    monkeypatch.setattr(module, lambda: (fake, "tensorrt_rtx"))
    opened = open_bundle(bundle)
    backend = TensorRTBackend(opened, HostDevice(), GPU, PLATFORM)
    with Model(opened, Chosen(backend, "tensorrt", None)) as model:
        assert_parity(model, Reference(source), config, TOLERANCES["fp32"].logits)


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


def test_a_cache_that_is_garbage_gives_its_memory_back(model: Model) -> None:
    backend = model._backend
    assert isinstance(backend, TensorRTBackend)
    assert isinstance(backend.device, HostDevice)
    held = backend.device.in_use

    def use() -> None:
        cache = model.new_cache(1, 8)
        model.prefill(cache, [[1]])
        model.decode(cache, [1])

    for _ in range(2):
        use()
        gc.collect()
        assert backend.device.in_use == held
    cache = model.new_cache(1, 8)
    with backend.lock:  # as in the middle of a step, when nothing may be freed
        del cache
        gc.collect()
        assert backend.device.in_use > held
    model.new_cache(1, 8).close()
    assert backend.device.in_use == held


def test_nothing_works_after_closing(model: Model) -> None:
    cache = model.new_cache(1, 8)
    cache.close()
    backend = model._backend
    model.close()
    model.close()
    with pytest.raises(NeoError, match="closed"):
        backend.open_cache(1, 8)
