"""One block of memory for one cache after the other: whose it is, and that nothing old is read."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import neo_runtime
import numpy as np
import pytest
from helpers.held_out import held_out_ids
from helpers.int8_cache import calibrated
from helpers.models import DEMO
from neo_export.cli import main as export
from neo_runtime.backends.cache_memory import KeptBlock, aligned_arrays, aligned_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from neo_runtime import Model
    from numpy.typing import NDArray

PROMPTS = (150, 3, 64, 30)
"""Tokens of each: past the window (64) and its quarter more, and as little as possible."""
STEPS = 90
CHUNK = 48


def address(block: NDArray[np.uint8]) -> int:
    found: int = block.ctypes.data
    return found


def test_a_block_serves_the_next_cache_of_about_its_size() -> None:
    kept = KeptBlock()
    first = kept.take(1000)
    assert not first.any()
    first[:] = 7
    kept.keep(first)
    again = kept.take(500)
    assert again is first, "twice what is asked for is near enough"
    assert kept.take(500) is not first, "it is taken"


@pytest.mark.parametrize("size", [499, 1001])
def test_a_block_of_another_size_is_let_go_first(size: int) -> None:
    kept = KeptBlock()
    kept.keep(block := kept.take(1000))
    gone = weakref.ref(block)
    del block
    other = kept.take(size)
    assert gone() is None
    assert len(other) == size
    assert not other.any()


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
        places = []
        for _ in range(3):
            with model.new_cache(1, 64) as cache:
                places.append(cache.store.contents()[0].ctypes.data)
        assert len(set(places)) == 1
        cache.close()
        closed = model._backend.open_cache(1, 64)
        closed.close()
        closed.close()  # not a second time: another cache may have the memory
        with model.new_cache(1, 64) as one, model.new_cache(1, 64) as other:
            closed.close()
            assert one.store.contents()[0].ctypes.data != other.store.contents()[0].ctypes.data
            with model.new_cache(1, 64) as third:
                taken = {cache.store.contents()[0].ctypes.data for cache in (one, other, third)}
                assert len(taken) == 3


@pytest.fixture(
    scope="module", params=["fp32", "fp16", "int8", "int4", "fp32-kv8", "int8-kv8", "int4-kv8"]
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("stale")
    precision, _, cache = request.param.partition("-")
    flags = [f"--{precision}", "--target", "cpu"]
    if cache:
        statistics = calibrated(DEMO, held_out_ids(2, 512), folder / "statistics")
        flags += ["--kv-cache", "int8", "--calibration", str(statistics)]
    assert export([str(DEMO), "-o", str(folder / "bundle"), *flags]) == 0
    with neo_runtime.load(folder / "bundle", threads=1, prefill_chunk=CHUNK) as loaded:
        yield loaded


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


def test_what_lay_in_the_memory_before_is_never_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeptBlock, "take", lambda _, size: np.zeros(size, np.uint8))
    expected = run(model)
    monkeypatch.setattr(KeptBlock, "take", lambda _, size: spoiled(size))
    for found, wanted in zip(run(model), expected, strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(found, wanted)
