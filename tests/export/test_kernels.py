"""Kernels for decode steps, interpreted, against PyTorch and against the decode graph."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.interpreted_kernels import InterpretingDevice, kernels_of, open_interpreted
from helpers.models import ODD_CONFIGS, Reference, TinyConfig, make_checkpoint
from helpers.parity import assert_parity
from helpers.running import relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.cuda.backend import CudaBackend
from neo_runtime.backends.device.locks import new_lock
from neo_runtime.bundle.folder import open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime.model import Model

CONFIGS = (
    "plain",
    "all_local",
    "window_1",
    "head_size_40",
    "intermediate_size",
    "vocabulary_11",
)
"""What a kernel treats in another way: of the sizes that no power of two divides one each."""
WIDE = TinyConfig(vocab_size=2100, num_heads=3, head_dim=64, max_position_embeddings=160)
"""Sums that several programs share, attention in several pieces, a vocabulary in two blocks."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_position_is_pytorchs(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "b", ExportOptions(target="cuda", precision="fp16"))
    with open_interpreted(tmp_path / "b", InterpretingDevice(), prefill_chunk=7) as model:
        assert_parity(model, Reference(source), config, TOLERANCES["fp16"].logits)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), WIDE)


def wide_bundle(wide: Path, tmp_path: Path, precision: str) -> Path:
    export_bundle(str(wide), tmp_path / "b", ExportOptions(target="cuda", precision=precision))
    return tmp_path / "b"


def steps_of(model: Model, prompts: list[Any], tokens: Any) -> list[Any]:
    """Logits of the steps behind prompts, float32 [batch, vocab] each."""
    with model.new_cache(len(prompts), WIDE.max_position_embeddings) as cache:
        model.prefill(cache, prompts)
        return [model.decode(cache, step).copy() for step in tokens]


@pytest.mark.parametrize(
    ("precision", "rows"),
    [("fp16", 1), ("fp16", 3), ("fp16", 20), ("int8", 1), ("int8", 3), ("int4", 1), ("int4", 20)],
)
def test_the_step_is_the_decode_graphs(
    precision: str, rows: int, wide: Path, tmp_path: Path
) -> None:
    """Both round to half precision, at different places: each is within the limit of the truth."""
    bundle = wide_bundle(wide, tmp_path, precision)
    generator = np.random.default_rng(rows)
    prompts = [generator.integers(0, WIDE.vocab_size, n) for n in ((150, 3, 64) * 7)[:rows]]
    tokens = generator.integers(0, WIDE.vocab_size, (2, rows))
    device = InterpretingDevice()
    with neo_runtime.load(bundle, backend="cpu") as graph, open_interpreted(bundle, device) as own:
        for found, expected in zip(
            steps_of(own, prompts, tokens), steps_of(graph, prompts, tokens), strict=True
        ):
            assert relative_l2(found, expected).max() <= 2 * TOLERANCES["fp16"].logits
        assert {"embed", "project", "attend", "best_of_block", "best_of_all"} <= set(
            device.launches
        )
        assert ("normalize" in device.launches) == (rows > 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_no_farther_from_pytorch_than_the_graph(rows: int, wide: Path, tmp_path: Path) -> None:
    """Roundings alone are left: a constant that is wrong in its second digit shows."""
    bundle = wide_bundle(wide, tmp_path, "fp16")
    ids = np.random.default_rng(rows).integers(0, WIDE.vocab_size, (rows, 12))
    expected = Reference(wide).logits(ids)[:, 10]
    with neo_runtime.load(bundle, backend="cpu") as graph:
        (by_graph,) = steps_of(graph, list(ids[:, :10]), [ids[:, 10]])
    with open_interpreted(bundle, InterpretingDevice()) as own:
        (by_kernels,) = steps_of(own, list(ids[:, :10]), [ids[:, 10]])
    errors = [relative_l2(found, expected).max() for found in (by_kernels, by_graph)]
    assert errors[0] <= 1.5 * errors[1]


def test_steps_of_all_sizes_share_their_memory(tmp_path: Path) -> None:
    """What a step for 16 rows leaves must not be where one for 32 counts."""
    config = TinyConfig(num_heads=16, head_dim=8, attention_layers=("global",))
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "b", ExportOptions(target="cuda", precision="fp16"))
    with open_interpreted(tmp_path / "b", InterpretingDevice()) as model:
        for rows in (16, 24, 1):
            ids = np.random.default_rng(rows).integers(0, config.vocab_size, (rows, 5))
            expected = Reference(source).logits(ids)[:, 4]
            with model.new_cache(rows, 16) as cache:
                model.prefill(cache, list(ids[:, :4]))
                found = model.decode(cache, ids[:, 4])
            assert relative_l2(found, expected).max() <= TOLERANCES["fp16"].logits


def test_long_caches_of_a_small_model(tmp_path: Path) -> None:
    """Attention in many pieces, which take more memory than any product's sums."""
    config = TinyConfig(max_position_embeddings=1500)
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "b", ExportOptions(target="cuda", precision="fp16"))
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (1, 1402))
    expected = Reference(source).logits(ids)[0, 1400:]
    with (
        open_interpreted(tmp_path / "b", InterpretingDevice()) as model,
        model.new_cache(1, 1500) as cache,
    ):
        model.prefill(cache, [ids[0, :1400]])
        found = [model.decode(cache, [token])[0].copy() for token in ids[0, 1400:]]
    assert relative_l2(np.stack(found), expected).max() <= TOLERANCES["fp16"].logits


@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_step_by_step_from_nothing(rows: int, tmp_path: Path) -> None:
    """No graph of bfloat16 runs on a CPU, so the kernels read the whole text themselves."""
    config = ODD_CONFIGS["plain"]
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "b", ExportOptions(target="cuda", precision="bf16"))
    ids = np.random.default_rng(4).integers(0, config.vocab_size, (rows, 20))
    expected = Reference(source).logits(ids)
    opened = open_bundle(tmp_path / "b")
    kernels = kernels_of(tmp_path / "b")
    with closing(CudaBackend(opened, InterpretingDevice(), kernels=kernels)) as backend:
        store = backend.open_cache(rows, 20)
        found = np.stack([store.decode(ids[:, n]).full() for n in range(20)], axis=1)
        store.close()
    assert relative_l2(found, expected).max() <= TOLERANCES["bf16"].logits


def test_candidates_are_those_of_the_logits(wide: Path, tmp_path: Path) -> None:
    bundle = wide_bundle(wide, tmp_path, "fp16")
    with open_interpreted(bundle, InterpretingDevice()) as model, model.new_cache(2, 64) as cache:
        model.prefill(cache, [[1, 2, 3], [4]])
        step = model.decode_step(cache, [5, 6])
        logits = step.full()
        found = step.candidates
        assert found is not None
        for row in range(2):
            ids = np.argsort(-logits[row], kind="stable")[:128]
            np.testing.assert_array_equal(found.ids[row], ids)
            np.testing.assert_array_equal(found.values[row], logits[row, ids])
            mass = np.exp(logits[row].astype(np.float64) - logits[row].max()).sum()
            assert found.exp_sums[row] == pytest.approx(mass, rel=1e-6)


def test_one_capture_for_a_slot_and_nothing_is_left(wide: Path, tmp_path: Path) -> None:
    bundle = wide_bundle(wide, tmp_path, "fp16")
    device = InterpretingDevice()
    with open_interpreted(bundle, device) as model:
        loaded = device.kernels
        for _ in range(2):
            model.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True)
        assert loaded == len(kernels_of(bundle).kernels)
        assert (device.captures, device.replays) == (1, 4)
        assert device.captured.count(True) == 0, "onnxruntime made no session for decoding"
    assert (device.kernels, device.discards) == (0, 1)
    assert device.closed


def test_a_capture_holds_the_locks_of_other_models(wide: Path, tmp_path: Path) -> None:
    """What this thread frees of theirs meanwhile would spoil it."""
    other = new_lock()
    held = []

    class Watching(InterpretingDevice):
        def capture(self, queue: Any) -> Any:
            held.append(other.locked())
            return super().capture(queue)

    with open_interpreted(wide_bundle(wide, tmp_path, "fp16"), Watching()) as model:
        model.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)
        assert held == [True]
        assert not other.locked()


def test_larger_batches_run_the_graph(wide: Path, tmp_path: Path) -> None:
    bundle = wide_bundle(wide, tmp_path, "fp16")
    device = InterpretingDevice()
    with open_interpreted(bundle, device) as model, model.new_cache(33, 64) as cache:
        backend = model._backend
        assert isinstance(backend, CudaBackend)
        model.prefill(cache, [[1]] * 33)
        logits = model.decode(cache, [2] * 33)
        assert np.isfinite(logits).all()
    assert not device.launches


def test_prefixes_of_the_last_row_are_not_read_behind_their_end(wide: Path, tmp_path: Path) -> None:
    """Positions that nobody wrote may hold anything, NaN too."""
    bundle = wide_bundle(wide, tmp_path, "fp16")
    with open_interpreted(bundle, InterpretingDevice()) as model:
        tokens = [[7], [8]]
        clean = steps_of(model, [[1, 2, 3]], tokens)
        with model.new_cache(1, WIDE.max_position_embeddings) as cache:
            for address, dtype, shape in cache.store.slot.cache.values():  # type: ignore[attr-defined]
                rubbish = np.full(shape, np.nan, dtype)
                rubbish[:, :, :3] = 0
                model._backend.device.upload(address, rubbish)  # type: ignore[attr-defined]
            model.prefill(cache, [[1, 2, 3]])
            again = [model.decode(cache, step).copy() for step in tokens]
    np.testing.assert_array_equal(np.stack(again), np.stack(clean))


@pytest.fixture(scope="module")
def shared_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle whose sums and attention several programs share."""
    folder = tmp_path_factory.mktemp("shared")
    config = TinyConfig(head_dim=64, max_position_embeddings=160)
    source = make_checkpoint(folder / "model", config)
    export_bundle(str(source), folder / "b", ExportOptions(target="cuda", precision="fp16"))
    return folder / "b"


def ragged_step(bundle: Path, device: InterpretingDevice, rows: int, *, overlap: bool) -> Any:
    """Logits of one step behind texts of several lengths, float32 [rows, vocab]."""
    ids = np.random.default_rng(7).integers(0, 61, 140)
    with (
        open_interpreted(bundle, device, overlap=overlap) as model,
        model.new_cache(rows, 160) as cache,
    ):
        model.prefill(cache, [ids[:n] for n in (140, 3, 64)[:rows]])
        return model.decode(cache, [5] * rows).copy()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_order_of_programs_changes_nothing(rows: int, shared_sums: Path) -> None:
    """A GPU runs them in any: whoever comes last adds the parts, always in the same order."""
    forwards, backwards = InterpretingDevice(), InterpretingDevice(backwards=True)
    expected = ragged_step(shared_sums, forwards, rows, overlap=False)
    found = ragged_step(shared_sums, backwards, rows, overlap=False)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_read_early_is_never_written(rows: int, shared_sums: Path) -> None:
    """Before it waits, a program may run beside the launches before it."""
    device = InterpretingDevice()
    assert np.isfinite(ragged_step(shared_sums, device, rows, overlap=True)).all()
    assert device.read_early
    assert device.written
    assert device.read_early.isdisjoint(device.written)
