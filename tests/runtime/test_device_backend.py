"""The CUDA backend over host memory and the CPU provider: everything but the GPU itself.

What it gives must be, number for number, what the CPU backend gives for the same bundle: both run
the same graphs, but this one through device memory, slots, candidates and captured steps.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.beginnings import assert_beginnings_hold
from helpers.cropping import assert_crops_hold
from helpers.forced import assert_forced_tokens_fit
from helpers.guessing import assert_guesses_change_nothing
from helpers.host_device import HostDevice
from helpers.joining import assert_rows_join
from helpers.kills import fork
from helpers.models import ODD_CONFIGS, Reference, make_checkpoint
from helpers.parity import assert_parity
from helpers.prefixes import assert_prefixes_hold
from helpers.running import relative_l2
from neo_export.exporter import ExportOptions, export_bundle
from neo_export.passes.fuse_attention import HEAD_SIZE_MULTIPLE
from neo_export.tolerances import TOLERANCES
from neo_runtime.backends.choice import Chosen
from neo_runtime.backends.cuda.backend import CudaBackend
from neo_runtime.backends.cuda.store import DeviceStore
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import BundleUnsupportedError, DeviceError, DeviceMemoryError, NeoError
from neo_runtime.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PROMPTS = ["Once upon a time", "The", "Tom and his dog went to the park. They saw a big tree and"]


@pytest.fixture(scope="module")
def cpu(cuda_bundle: Path) -> Iterator[Model]:
    # The kernels that the device's sessions have: equal sums, in equal order.
    config = {"session.disable_prepacking": "1"}
    with neo_runtime.load(cuda_bundle, backend="cpu", session_config=config) as model:
        yield model


@pytest.fixture(scope="module")
def device_model(cuda_bundle: Path) -> Iterator[Model]:
    with open_model(cuda_bundle, HostDevice()) as model:
        yield model


def open_model(bundle: Path, device: HostDevice, **options: Any) -> Model:
    opened = open_bundle(bundle)
    return Model(opened, Chosen(CudaBackend(opened, device), "cuda", None), **options)


def host(model: Model) -> HostDevice:
    backend = model._backend
    assert isinstance(backend, CudaBackend)
    assert isinstance(backend.device, HostDevice)
    return backend.device


CASES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"do_sample": True, "seed": 1},
    {"do_sample": True, "seed": 2, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "seed": 3, "top_k": 0},
    {"do_sample": True, "seed": 4, "temperature": 0.7, "top_p": 0.8, "min_p": 0.02},
    {"do_sample": True, "seed": 5, "num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"logprobs": 2},
    {"logit_bias": {11: 3.0}, "presence_penalty": 0.4},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_completions(case: dict[str, Any], cpu: Model, device_model: Model) -> None:
    def facts(model: Model) -> list[tuple[Any, ...]]:
        # A row that ends leaves the batch on the CPU alone, and other products are other sums.
        found = model.generate(PROMPTS, max_new_tokens=24, ignore_eos=True, **case)
        return [(c.token_ids, c.text, c.finish_reason, c.logprobs, c.score) for c in found]

    assert facts(device_model) == facts(cpu)


@pytest.mark.parametrize(
    "name", [n for n, config in ODD_CONFIGS.items() if config.head_dim % HEAD_SIZE_MULTIPLE == 0]
)
def test_checkpoints_that_stand_out(name: str, tmp_path: Path) -> None:
    """As `tests/gpu` has it on a GPU: every position against PyTorch, by every kind of call."""
    config = ODD_CONFIGS[name]
    source = make_checkpoint(tmp_path / "model", config)
    export_bundle(str(source), tmp_path / "b", ExportOptions(target="cuda", precision="fp16"))
    with open_model(tmp_path / "b", HostDevice(), prefill_chunk=7) as model:
        assert_parity(model, Reference(source), config, TOLERANCES["fp16"].logits)


def test_candidates_give_the_text_of_full_logits(
    cpu: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU backend, too, candidates decide where they can."""
    options = {"max_new_tokens": 60, "do_sample": True, "seed": 9, "top_p": 0.95}
    with_candidates = cpu.generate(PROMPTS, **options)
    monkeypatch.setattr("neo_runtime.backends.step_logits.RowLogits.candidates", None)
    assert [c.text for c in cpu.generate(PROMPTS, **options)] == [c.text for c in with_candidates]


def test_across_the_window_and_to_the_last_position(cpu: Model, device_model: Model) -> None:
    ids = np.random.default_rng(0).integers(0, 4096, cpu.manifest.max_length)
    for prompt in (1, 63, 64, 65, 300, len(ids) - 3):
        models = (cpu, device_model)
        caches = [model.new_cache(1, len(ids)) for model in models]
        both = [m.prefill(c, [ids[:prompt]]) for m, c in zip(models, caches, strict=True)]
        np.testing.assert_array_equal(*both)
        for token in ids[prompt : prompt + 3]:
            both = [m.decode(c, [token]) for m, c in zip(models, caches, strict=True)]
            np.testing.assert_array_equal(*both)
        for cache in caches:
            cache.close()


def test_chunks_and_later_turns(cuda_bundle: Path, cpu: Model) -> None:
    ids = np.random.default_rng(1).integers(0, 4096, (2, 90))
    with open_model(cuda_bundle, HostDevice(), prefill_chunk=17) as model:
        expected, found = cpu.new_cache(2, 128), model.new_cache(2, 128)
        first = [row[:n] for row, n in zip(ids, (40, 25), strict=True)]
        later = [row[n : n + 31] for row, n in zip(ids, (40, 25), strict=True)]
        for turn in (first, later):
            a, b = cpu.prefill(expected, turn), model.prefill(found, turn)
            # Other chunks are other sums: as near as half precision is.
            assert relative_l2(b, a).max() <= TOLERANCES["fp16"].logits
            assert (b.argmax(1) == a.argmax(1)).all()
        assert found.lengths.tolist() == [71, 56]


def test_rows_trade_places_and_leave(cpu: Model, device_model: Model) -> None:
    ids = np.random.default_rng(3).integers(0, 4096, (3, 60))
    models = (cpu, device_model)
    caches = [model.new_cache(3, 100) for model in models]
    prompts = [row[:n] for row, n in zip(ids, (5, 33, 20), strict=True)]
    for model, cache in zip(models, caches, strict=True):
        model.prefill(cache, prompts)
        model.decode(cache, [1, 2, 3])
    for rows in ([2, 0, 1], [1, 1], [0]):  # permuted, repeated and fewer, fewer
        for cache in caches:
            cache.reorder(rows)
        for token in (7, 8):
            found, expected = (
                model.decode(cache, [token] * len(rows))
                for model, cache in zip(models[::-1], caches[::-1], strict=True)
            )
            assert relative_l2(found, expected).max() <= TOLERANCES["fp16"].logits
    assert caches[1].lengths.tolist() == caches[0].lengths.tolist() == [12]
    store = caches[1].store
    assert isinstance(store, DeviceStore)
    # Rows that are not in use have one position: nothing in a step is undefined.
    assert store.slot.host_mask.sum(axis=1).tolist() == [12, 1, 1]
    for cache in caches:
        cache.close()


def test_rows_join_and_leave(device_model: Model) -> None:
    assert_rows_join(device_model, TOLERANCES["fp16"].logits)


def test_a_row_that_joins_is_clean(device_model: Model) -> None:
    """Masked positions may pass through a GPU's kernels: what was there must not."""
    with device_model.new_cache(2, 16) as cache:
        device_model.prefill(cache, [[1, 2], [3, 4]])
        cache.reorder([0])
        cache.extend(1)
        for array in cache.store.contents():
            assert array[0].any()
            assert not array[1].any()


def test_rows_begin_with_another_cache(device_model: Model) -> None:
    assert_prefixes_hold(device_model, TOLERANCES["fp16"].logits)
    assert_beginnings_hold(device_model, TOLERANCES["fp16"].logits)


def test_positions_are_taken_away(device_model: Model) -> None:
    assert_crops_hold(device_model, TOLERANCES["fp16"].logits)


def test_guesses_change_nothing(device_model: Model) -> None:
    assert_guesses_change_nothing(device_model, 0.01)


def test_forced_tokens_fit(device_model: Model) -> None:
    assert_forced_tokens_fit(device_model, 0.01)


def test_scores(cpu: Model, device_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(2).integers(0, 4096, 200)
    expected = cpu.logits(ids)
    np.testing.assert_array_equal(device_model.logits(ids), expected)
    monkeypatch.setattr("neo_runtime.backends.cuda.backend.CudaBackend.scored_at_once", 64)
    assert relative_l2(device_model.logits(ids), expected).max() <= TOLERANCES["fp16"].logits


def test_a_few_bytes_a_token(device_model: Model) -> None:
    device = host(device_model)
    with device_model.new_cache(1, 64) as cache:
        step = device_model.prefill_step(cache, [[1, 2, 3]])
        device_model.decode_step(cache, [5])  # brings the whole mask up to date, once
        down, up = device.downloaded, device.uploaded
        step = device_model.decode_step(cache, [6])
        assert device.downloaded - down <= 128 * 12 + 3 * 256
        assert device.uploaded - up == 3 * 8  # a token, its position, its place in the mask
        assert step.full().shape == (1, device_model.manifest.model.vocab_size)
        assert device.downloaded - down > 4 * device_model.manifest.model.vocab_size


def test_one_copy_of_the_weights(cuda_bundle: Path) -> None:
    """All graphs read the same bytes: a change in them changes what each gives."""
    device = HostDevice()
    with open_model(cuda_bundle, device) as model:
        size = (cuda_bundle / "weights.bin").stat().st_size
        assert [len(block) for block in device.blocks.values()] == [size]
        [address] = device.blocks

        def results() -> list[np.ndarray]:
            with model.new_cache(1, 16) as cache:
                logits = [model.prefill(cache, [[1, 2, 3]]), model.decode(cache, [4])]
            return [*logits, model.logits([1, 2, 3])]

        before = results()
        half = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint16))
        for place in range(size // 2):
            half[place] ^= 0x0001 if place % 7 == 0 else 0
        after = results()
        for old, new in zip(before, after, strict=True):
            assert (old != new).any()
        assert sum(len(block) == size for block in device.blocks.values()) == 1


def test_only_decoding_is_captured(cuda_bundle: Path) -> None:
    device = HostDevice()
    with open_model(cuda_bundle, device) as model:
        model._backend.prepare()
        model.logits([1, 2])
        backend = model._backend
        assert isinstance(backend, CudaBackend)
        patterns = {
            graph: backend._sessions.get(graph).get_session_options().enable_mem_pattern
            for graph in ("prefill", "decode", "score")
        }
    assert device.captured == [False, True, False]
    assert patterns == {"prefill": False, "decode": True, "score": False}


def test_slots_are_used_again_and_given_back(cuda_bundle: Path) -> None:
    device = HostDevice()
    model = open_model(cuda_bundle, device)
    for length in (4, 300):
        model.generate("Once", max_new_tokens=length)
    held = device.in_use
    for length in (5, 280):
        model.generate("The", max_new_tokens=length)
    assert device.in_use == held
    for batch in range(2, 6):
        model.generate(["Once"] * batch, max_new_tokens=2)
    backend = model._backend
    assert isinstance(backend, CudaBackend)
    assert sum(slot.nbytes for slot in backend.slots.items) <= backend.weight_bytes
    model.generate(
        ["Once"] * 40, max_new_tokens=2, batch_size=40
    )  # more than the weights: kept by itself
    assert [slot.batch for slot in backend.slots.items] == [40]
    model.close()
    model.close()
    assert device.closed
    with pytest.raises(NeoError, match="closed"):
        model.generate("Once", max_new_tokens=1)


def test_a_cache_may_outlive_its_model(cuda_bundle: Path) -> None:
    device = HostDevice()
    model = open_model(cuda_bundle, device)
    cache = model.new_cache(1, 16)
    model.prefill(cache, [[1, 2]])
    model.close()
    assert not device.closed
    with pytest.raises(NeoError, match="closed"):
        model.decode(cache, [1])
    cache.close()
    assert device.closed


def test_a_cache_that_is_garbage_gives_its_memory_back(cuda_bundle: Path) -> None:
    device = HostDevice()
    model = open_model(cuda_bundle, device)
    backend = model._backend
    assert isinstance(backend, CudaBackend)

    def drop() -> int:
        model.prefill(model.new_cache(2, 16), [[1], [2]])
        gc.collect()
        return device.in_use

    assert len({drop() for _ in range(6)}) == 1
    cache = model.new_cache(1, 16)
    with backend.lock:  # as in the middle of a step, when nothing may be freed
        del cache
        gc.collect()
        assert len(backend.slots._taken) == 1
    model.new_cache(1, 16).close()
    assert backend.slots._taken == []
    cache = model.new_cache(1, 16)
    model.close()
    assert not device.closed
    del cache
    gc.collect()
    assert device.closed


def test_a_prefix_cache_may_outlive_its_model(cuda_bundle: Path) -> None:
    """And gives its memory back when it is closed, or garbage, once nobody uses the device."""
    device = HostDevice()
    model = open_model(cuda_bundle, device)
    backend = model._backend
    assert isinstance(backend, CudaBackend)
    held, size = device.in_use, 10**6
    forgotten, kept = model.new_prefix_cache(size), model.new_prefix_cache(size)
    assert device.in_use == held + 2 * kept.nbytes
    assert size // 2 < kept.nbytes <= size
    with backend.lock:  # as in the middle of a step, when nothing may be freed
        del forgotten
        gc.collect()
        assert device.in_use == held + 2 * kept.nbytes
    model.new_cache(1, 16).close()
    model.new_prefix_cache(size).close()
    model.close()
    assert not device.closed
    kept.close()
    assert device.closed
    kept.close()


def test_room_for_a_prefix_cache(cuda_bundle: Path) -> None:
    """Idle slots make room; what does not fit even so leaves nothing behind."""
    device = HostDevice()
    with open_model(cuda_bundle, device) as model:
        empty = device.in_use
        model.generate("Once", max_new_tokens=300)
        device.capacity = device.in_use + 1000
        with model.new_prefix_cache(10**6):
            assert device.in_use < device.capacity
        assert device.in_use == empty
        with pytest.raises(DeviceMemoryError):
            model.new_prefix_cache(10**9)
        assert (device.in_use, model.cache_bytes_in_use) == (empty, 0)


def test_what_fails_for_want_of_memory_keeps_none(
    cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    with open_model(cuda_bundle, device) as model:
        model.logits([1] * 300)
        held = device.in_use
        device.capacity = held + 1000  # less than the logits of 300 positions
        for _ in range(6):
            with pytest.raises(DeviceMemoryError):
                model.logits([1] * 300)
        assert device.in_use == held
        device.capacity = None

        def pinned(size: int) -> NDArray[np.uint8]:
            raise DeviceError("CUDA failed to pin host memory")

        monkeypatch.setattr(device, "pinned", pinned)
        with pytest.raises(DeviceError):
            model.new_cache(7, 16)
        assert device.in_use == held


def test_stale_slots_do_not_show(cuda_bundle: Path, cpu: Model) -> None:
    with open_model(cuda_bundle, HostDevice()) as model:
        model.generate("Tom ran and ran and ran through the wood", max_new_tokens=200)
        found = model.generate("Once", max_new_tokens=30)
    assert found.text == cpu.generate("Once", max_new_tokens=30).text


def test_memory_is_freed_before_it_is_refused(cuda_bundle: Path) -> None:
    device = HostDevice()
    with open_model(cuda_bundle, device) as model:
        model.generate("Once", max_new_tokens=2)
        need = model.cache_bytes(2, 16)
        device.capacity = device.in_use + need * 3 // 4
        model.generate(["Once", "The"], max_new_tokens=2)  # the idle slot made room
        with pytest.raises(DeviceMemoryError, match="no memory left"):
            model.generate(["Once"] * 40, max_new_tokens=2)
        assert model.cache_bytes_in_use == 0
        device.capacity = None
        assert model.generate("Once", max_new_tokens=2).text


def test_weights_that_do_not_fit(cuda_bundle: Path) -> None:
    device = HostDevice(capacity=1000)
    with pytest.raises(DeviceMemoryError):
        CudaBackend(open_bundle(cuda_bundle), device)
    assert not device.blocks


def test_a_bundle_for_another_backend(mini_bundle: Path) -> None:
    with pytest.raises(BundleUnsupportedError, match=r"exported for cpu.*--target cuda"):
        CudaBackend(open_bundle(mini_bundle), HostDevice())


def test_threads_take_turns(device_model: Model, cpu: Model) -> None:
    expected = [cpu.generate(prompt, max_new_tokens=20).text for prompt in PROMPTS]
    found: dict[str, str | None] = {}

    def work(prompt: str) -> None:
        found[prompt] = device_model.generate(prompt, max_new_tokens=20).text

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in PROMPTS] == expected


def test_a_provider_that_did_not_start_is_an_error(cuda_bundle: Path) -> None:
    """onnxruntime runs on the CPU without a word where its CUDA libraries are missing."""

    class WithoutLibraries(HostDevice):
        def providers(self, *, capture: bool) -> list[Any]:
            return [("CUDAExecutionProvider", {}), "CPUExecutionProvider"]

    backend = CudaBackend(open_bundle(cuda_bundle), WithoutLibraries())
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(DeviceError, match="could not start its CUDAExecutionProvider"),
    ):
        backend.prepare()
    backend.close()


def test_a_copy_of_nothing(device_model: Model) -> None:
    """No bytes are copied: the device's library does not say what that means."""
    with device_model.new_cache(1, 8) as source, device_model.new_cache(2, 8) as target:
        target.copy_from(source, [0, 1])
        logits = device_model.prefill(target, [[1, 2], [1, 2]])
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_leaves_the_device_alone(cuda_bundle: Path) -> None:
    """It would wait for sessions' threads that are not there, and free what is not its own."""
    device = HostDevice()
    model, other = open_model(cuda_bundle, device), open_model(cuda_bundle, HostDevice())
    expected = model.generate("Tom", max_new_tokens=3).text
    caches = [model.new_cache(1, 8) for _ in range(2)]
    held = dict(device.blocks)

    def child() -> None:
        nonlocal model
        signal.alarm(60)
        other.close()
        caches[0].close()
        with pytest.raises(NeoError, match="does not survive a fork"):
            model.generate("Tom", max_new_tokens=3)
        del model
        caches.clear()
        gc.collect()
        assert device.blocks.keys() == held.keys()

    pid = fork(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert model.generate("Tom", max_new_tokens=3).text == expected
    for each in caches:
        each.close()
    model.close()
    other.close()
    assert device.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_ends(cuda_bundle: Path) -> None:
    """As any program does: with all that its modules hold."""
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from runtime.test_device_backend import HostDevice, open_model
model, closed = (open_model(sys.argv[1], HostDevice()) for _ in range(2))
model.generate("Tom", max_new_tokens=3)
cache, kept = model.new_cache(1, 8), closed.new_cache(1, 8)
closed.close()
if os.fork() == 0:
    signal.alarm(60)
    sys.exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-c", script, str(cuda_bundle), str(tests)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
