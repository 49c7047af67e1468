"""One block of memory for one cache after the other: whose it is, and that nothing old is read."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.held_out import held_out_ids
from helpers.int8_cache import calibrated
from helpers.mappings import private_bytes
from helpers.models import DEMO
from helpers.rounding import rounded_to_nearest
from neo_export.command.cli import main as export
from neo_runtime.backends.cpu import unused_memory
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.backends.cpu.cache_memory import KeptBlock, aligned_arrays, aligned_size
from neo_runtime.backends.cpu.in_place import InPlaceStore
from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from pathlib import Path

    from neo_runtime import Model
    from neo_runtime.backends.base import CacheStore
    from numpy.typing import NDArray

PROMPTS = (150, 3, 64, 30)
"""Tokens of each: past the window (64) and its quarter more, and as little as possible."""
STEPS = 90


def test_a_block_serves_the_next_cache() -> None:
    kept = KeptBlock()
    first = kept.take(1000)
    assert not first.any()
    first[:] = 7
    kept.keep(first)
    assert kept.take(500) is first
    assert kept.take(500) is not first, "it is taken"


def test_a_block_that_is_too_small_is_let_go_first() -> None:
    kept = KeptBlock()
    kept.keep(block := kept.take(1000))
    gone = weakref.ref(block)
    del block
    other = kept.take(1001)
    assert gone() is None
    assert len(other) == 1001
    assert not other.any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_of_a_longer_block_only_what_is_asked_for_stays_in_memory() -> None:
    kept, mega = KeptBlock(), 1 << 20
    block = kept.take(64 * mega)
    block[:] = 7
    kept.keep(block)
    before = private_bytes()
    assert kept.take(mega) is block
    assert before - private_bytes() > 60 * mega
    assert (block[:mega] == 7).all()


def test_a_longer_block_is_of_no_use_where_its_rest_cannot_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unused_memory, "c_function", lambda _: None)
    kept = KeptBlock()
    kept.keep(block := kept.take(1 << 20))
    assert kept.take(1 << 20) is block
    kept.keep(block)
    assert kept.take(1 << 19) is not block


def test_one_block_is_kept_and_none_behind_close() -> None:
    kept = KeptBlock()
    blocks = [kept.take(100), kept.take(100), kept.take(100)]
    kept.keep(blocks[0])
    kept.keep(blocks[1])
    gone = weakref.ref(blocks.pop(0))
    assert gone() is None
    kept.close()
    kept.keep(blocks[1])
    references = [weakref.ref(block) for block in blocks]
    blocks.clear()
    assert [reference() for reference in references] == [None, None]


def test_arrays_in_a_block_do_not_overlap() -> None:
    shapes = [(3, 5), (1, 7), (2, 2)]
    block = np.full(aligned_size(shapes, "float16"), 255, np.uint8)
    arrays = aligned_arrays(block, shapes, "float16")
    assert [array.shape for array in arrays] == shapes
    for number, array in enumerate(arrays):
        assert array.ctypes.data % 4096 == 0
        array[:] = number
    assert [np.unique(array).tolist() for array in arrays] == [[0], [1], [2]]


def test_requests_in_a_row_share_memory_and_requests_at_once_do_not(mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        blocks = []
        for _ in range(3):
            with model.new_cache(1, 64) as cache:
                blocks.append(block_of(cache.store))
        assert blocks[0] is blocks[1] is blocks[2] is not None
        closed = model._backend.open_cache(1, 64)
        assert block_of(closed) is blocks[0]
        closed.close()
        closed.close()  # not a second time: another cache may have the memory
        with model.new_cache(1, 64) as one, model.new_cache(1, 64) as other:
            closed.close()
            with model.new_cache(1, 64) as third:
                taken = [block_of(cache.store) for cache in (one, other, third)]
                assert taken[0] is blocks[0]
                assert len({id(block) for block in taken}) == 3


def block_of(store: CacheStore) -> NDArray[np.uint8] | None:
    assert isinstance(store, InPlaceStore)
    return store._block


def test_memory_that_is_computed_in_is_not_handed_on(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the rules another thread closes a cache in the middle of a step."""
    with neo_runtime.load(mini_bundle, threads=1) as model:
        store = model._backend.open_cache(1, 64)
        store.prefill([np.arange(5)], 64)
        block, run = block_of(store), BoundCall.run

        def close_meanwhile(call: BoundCall) -> None:
            store.close()
            run(call)

        monkeypatch.setattr(BoundCall, "run", close_meanwhile)
        store.decode(np.array([5]))
        monkeypatch.undo()
        with model.new_cache(1, 64) as cache:
            assert block_of(cache.store) is not block
        with pytest.raises(NeoError, match="closed"):
            store.decode(np.array([5]))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "statistics"
    return calibrated(DEMO, held_out_ids(2, 512), folder)


@pytest.fixture(
    scope="module", params=["fp32", "fp16", "int8", "int4", "fp32-kv8", "int8-kv8", "int4-kv8"]
)
def bundle(
    request: pytest.FixtureRequest, statistics: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("stale")
    precision, _, cache = request.param.partition("-")
    flags = [f"--{precision}", "--target", "cpu"]
    if cache:
        flags += ["--kv-cache", "int8", "--calibration", str(statistics)]
    with rounded_to_nearest():
        assert export([str(DEMO), "-o", str(folder / "bundle"), *flags]) == 0
    return folder / "bundle"


def spoiled(size: int) -> NDArray[np.uint8]:
    """NaN in float32 and in float16, −1 in int8."""
    return np.full(size, 255, np.uint8)


def run(model: Model) -> list[NDArray[np.float32]]:
    """Prompts of several lengths in chunks, steps past the window, moving rows, a second turn."""
    ids = held_out_ids(len(PROMPTS) + 1, 160)
    prompts = [row[:count] for row, count in zip(ids, PROMPTS, strict=False)]
    with model.new_cache(len(PROMPTS), 300) as cache:
        seen = [model.prefill(cache, prompts).copy()]
        for step in range(STEPS):
            if step == STEPS // 2:
                cache.reorder([2, 0, 3, 1])
            seen.append(model.decode(cache, [5 + step, 6, 7, 8]).copy())
        seen.append(model.prefill(cache, [ids[-1][:20]] * len(PROMPTS)).copy())
    with model.new_cache(2, 40) as cache:
        seen.append(model.prefill(cache, [ids[0][:20], ids[1][:3]]).copy())
        seen.append(model.decode(cache, [1, 2]).copy())
    return seen


@pytest.mark.parametrize("chunk", [48, 1024], ids=["in_chunks", "together"])
def test_what_lay_in_the_memory_before_is_never_read(
    bundle: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with neo_runtime.load(bundle, threads=1, prefill_chunk=chunk) as model:
        monkeypatch.setattr(KeptBlock, "take", lambda _, size: np.zeros(size, np.uint8))
        expected = run(model)
        monkeypatch.setattr(KeptBlock, "take", lambda _, size: spoiled(size))
        for found, wanted in zip(run(model), expected, strict=True):
            assert np.isfinite(wanted).all()
            np.testing.assert_array_equal(found, wanted)
