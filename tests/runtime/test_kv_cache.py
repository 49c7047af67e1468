"""The cache: its size and limit, what it gives back, and rows that move."""

from __future__ import annotations

import gc
import re
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.beginnings import assert_beginnings_hold
from helpers.cropping import assert_crops_hold
from helpers.hf_reference import reference_logits, relative_error, varied_prompts
from helpers.joining import assert_rows_join
from helpers.prefixes import assert_prefixes_hold
from neo_runtime import PromptLookup
from neo_runtime.backends.base import spoil_views
from neo_runtime.backends.cpu import append, in_place
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.backends.cpu.cache_memory import KeptBlock
from neo_runtime.cache.ledger import CacheLedger
from neo_runtime.errors import (
    CacheLimitError,
    ContextLengthError,
    DeviceMemoryError,
    NeoError,
    RequestError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_runtime import KVCache, Model
    from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend
    from numpy.typing import NDArray


@pytest.fixture(scope="module", params=["mini_bundle", "portable_bundle"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with neo_runtime.load(request.getfixturevalue(request.param), threads=1) as loaded:
        yield loaded


def test_its_size_is_known_before(model: Model) -> None:
    # 3 rows, keys and values, 3 heads of 64 channels, float32. Appending needs two sets of four
    # layers; in place the two local layers hold their window of 64 and a quarter.
    sets = 2 if model.manifest.cache.layout == "append" else 1
    positions = 2 * 4 * 100 if sets == 2 else 2 * 100 + 2 * 80
    assert model.cache_bytes(3, 100) == positions * 3 * 2 * 3 * 64 * 4
    with model.new_cache(3, 100) as cache:
        assert cache.nbytes == model.cache_bytes(3, 100) == model.cache_bytes_in_use
        store = cache.store
        names = ("_buffers",) if sets == 1 else ("_past", "_present")
        arrays = [array for name in names for array in getattr(store, name)]
        assert sum(array.nbytes for array in arrays) == cache.nbytes
        assert all(array.ctypes.data % 4096 == 0 for array in arrays)
        with model.new_cache(1, 8) as other:
            assert model.cache_bytes_in_use == cache.nbytes + other.nbytes
    assert model.cache_bytes_in_use == 0


def test_it_is_given_back(model: Model) -> None:
    cache = model.new_cache(1, 8)
    assert not cache.closed
    cache.close()
    cache.close()
    assert cache.closed
    assert model.cache_bytes_in_use == 0
    for call in (
        lambda: cache.lengths,
        lambda: cache.reorder([0]),
        lambda: model.prefill(cache, [[1]]),
        lambda: model.decode(cache, [1]),
    ):
        with pytest.raises(NeoError, match="cache is closed"):
            call()
    model.prefill(model.new_cache(2, 8), [[1], [2]])
    gc.collect()
    assert model.cache_bytes_in_use == 0
    for batch, length, wrong in ((0, 8, "batch is 0"), (1, 2.0, "length is 2.0")):
        with pytest.raises(RequestError, match=f"{wrong}, expected an integer of at least 1"):
            model.new_cache(batch, length)  # type: ignore[arg-type]
    with pytest.raises(CacheLimitError, match="more than the system has"):
        model.new_cache(2**50, 8)


def test_a_call_that_ends_early_ends_the_cache(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph has written into the cache by then, and lengths say nothing of it."""
    run = BoundCall.run

    def interrupted(call: BoundCall) -> None:
        run(call)
        raise KeyboardInterrupt

    steps: tuple[Callable[[KVCache], object], ...] = (
        lambda cache: model.prefill(cache, [[1], [2, 3]]),
        lambda cache: model.decode(cache, [1, 2]),
        lambda cache: cache.reorder([1, 0]),
        lambda cache: cache.crop(1),
        lambda cache: cache.room_to_crop,
    )
    for broken in steps[:2]:
        with model.new_cache(2, 8) as cache:
            steps[0](cache)
            with monkeypatch.context() as patched:
                patched.setattr(BoundCall, "run", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    broken(cache)
            for call in steps:
                with pytest.raises(NeoError, match=r"failed or was interrupted.*make another"):
                    call(cache)
    with model.new_cache(2, 8) as cache:
        for wrong in ([[1], []], [[1], [10**6]], [[1]], [[1] * 9, [1]]):
            with pytest.raises(RequestError):
                model.prefill(cache, wrong)
        for call in steps:  # what was refused has changed nothing
            call(cache)
    assert model.cache_bytes_in_use == 0


def test_two_threads_at_one_cache(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told so, and the first goes on."""
    run, inside, go_on = BoundCall.run, threading.Event(), threading.Event()

    def slow(call: BoundCall) -> None:
        inside.set()
        assert go_on.wait(timeout=60)
        run(call)

    with model.new_cache(1, 8) as cache:
        expected = model.prefill(cache, [[1, 2]]).copy()
    with model.new_cache(1, 8) as cache:
        found: list[NDArray[np.float32]] = []
        monkeypatch.setattr(BoundCall, "run", slow)
        first = threading.Thread(target=lambda: found.append(model.prefill(cache, [[1, 2]])))
        first.start()
        assert inside.wait(timeout=60)
        with pytest.raises(NeoError, match=r"in use by another call.*one for each"):
            model.decode(cache, [1])
        go_on.set()
        first.join()
        np.testing.assert_array_equal(found[0], expected)
        model.decode(cache, [3])


def test_a_cache_of_another_model_is_refused(model: Model, mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as other, other.new_cache(1, 8) as cache:
        for call in (model.prefill, model.decode):
            with pytest.raises(RequestError, match="another model's"):
                call(cache, [[1]])  # type: ignore[operator]
            with pytest.raises(RequestError, match="of type NoneType, expected one of"):
                call(None, [[1]])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([True, False], r"booleans.*np\.flatnonzero"),
        ([0.0, 1.0], "float64 of shape"),
        (1, r"shape \[\]"),
        ("ab", "expected a flat sequence"),
        ([[0], [1]], r"shape \[2, 1\]"),
        ([[0], [1, 1]], "expected a flat sequence"),
        ([0, 1, 0], "3 rows, expected at most 2"),
        ([2], "expected 0 to 1"),
    ],
)
def test_rows_that_are_none(model: Model, rows: Any, message: str) -> None:
    with model.new_cache(2, 8) as cache, pytest.raises(RequestError, match=message):
        cache.reorder(rows)


def test_finalizers_wait_for_no_lock() -> None:
    """They run at any moment, in a thread that holds the lock, too."""
    ledger, kept = CacheLedger(100), KeptBlock()
    ledger.reserve(60, "a cache")
    with ledger._lock, kept._lock:
        ledger.release(60)
        kept.keep(np.zeros(10, np.uint8))
    ledger.reserve(100, "a cache")
    assert ledger.in_use == 100
    with pytest.raises(CacheLimitError, match="100 of the limit of 100 bytes are in use"):
        ledger.reserve(1, "a cache")


def test_a_limit_holds_for_all_caches_together(mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        one, whole = model.cache_bytes(1, 16), model.cache_bytes(1, 144)
    assert 2 * one < whole
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=2 * one) as model:
        with model.new_cache(1, 16) as first, model.new_cache(1, 16):
            assert first.nbytes == one
            with pytest.raises(CacheLimitError, match=rf"1 x 16 .*{one} bytes; {2 * one} of"):
                model.new_cache(1, 16)
            with pytest.raises(CacheLimitError):
                model.generate([1], max_new_tokens=1)
            assert model.cache_bytes_in_use == 2 * one
        assert model.cache_bytes_in_use == 0
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=whole) as model:
        # Exactly the limit: the last token needs no position.
        prompt, options = [1] * 125, {"max_new_tokens": 20, "ignore_eos": True}
        assert len(model.generate(prompt, **options).token_ids) == 20
        with pytest.raises(CacheLimitError):
            model.generate(prompt, **options | {"max_new_tokens": 21})
        with pytest.raises(CacheLimitError):
            model.generate([prompt] * 2, **options, batch_size=2)
        assert len(model.generate([prompt] * 2, **options, batch_size=1)) == 2
        assert len(model.generate([prompt] * 2, **options)) == 2, "batches that fit the limit"
        assert model.cache_bytes_in_use == 0


@pytest.mark.parametrize(
    ("rows", "how"),
    [
        (2, {"num_beams": 2}),
        (2, {"num_return_sequences": 2, "do_sample": True}),
        (1, {"drafter": PromptLookup()}),
    ],
    ids=["beams", "copies", "guesses"],
)
def test_the_last_token_needs_no_position(
    rows: int, how: dict[str, Any], mini_bundle: Path
) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        whole = model.cache_bytes(rows, 144)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=whole) as model:
        for most, fits in ((20, True), (21, False)):
            with nullcontext() if fits else pytest.raises(CacheLimitError):
                model.generate([1] * 125, max_new_tokens=most, ignore_eos=True, **how)


def test_more_than_the_system_has_is_a_limit_too(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:

        def refuse(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(KeptBlock, "take", refuse)
        with pytest.raises(CacheLimitError, match="than the system has"):
            model.new_cache(1, 8)
        assert model.cache_bytes_in_use == 0


@pytest.mark.parametrize("error", [DeviceMemoryError("of the GPU"), RuntimeError("a driver")])
def test_what_says_itself_why_there_is_no_memory(error: Exception) -> None:
    """An error of the device's, or one that is about no memory at all, is not made a limit."""
    ledger = CacheLedger(limit=None)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        ledger.allocate(100, "a cache", fail)
    assert caught.value is error
    assert ledger.in_use == 0


def test_the_account_is_safe_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = CacheLedger(limit=1000)
    refused, seen = [], []
    settled = CacheLedger._settled

    def slowly(self: CacheLedger) -> int:
        found = settled(self)
        time.sleep(1e-5)  # others may go on here, between the look and what follows from it
        return found

    monkeypatch.setattr(CacheLedger, "_settled", slowly)

    def work() -> None:
        for _ in range(200):
            try:
                ledger.reserve(300, "a cache")
            except CacheLimitError:
                refused.append(1)
            else:
                seen.append(ledger.in_use)
                ledger.release(300)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.in_use == 0
    assert refused
    assert max(seen) <= 1000


def test_rows_can_be_dropped_permuted_and_repeated(model: Model) -> None:
    said = [prompt[:n] for prompt, n in zip(varied_prompts(), (70, 3, 90, 20), strict=False)]
    with model.new_cache(5, 128) as cache:
        cache.reorder(range(4))
        model.prefill(cache, said)
        token = 7
        for rows in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 3, 0, 1, 0], [4, 0], [1, 1, 0, 1], [2]):
            cache.reorder(rows)
            said = [said[row] for row in rows]
            token += 1
            tokens = [token + 13 * place for place in range(len(rows))]
            found = model.decode(cache, tokens)
            said = [[*ids, new] for ids, new in zip(said, tokens, strict=True)]
            expected = np.stack([reference_logits(ids)[-1] for ids in said])
            assert cache.lengths.tolist() == [len(ids) for ids in said]
            assert relative_error(found, expected) < 1e-5, rows
        for rows, message in (([0] * 6, "6 rows"), ([1], "0 to 0"), ([-1], "0 to")):
            with pytest.raises(RequestError, match=message):
                cache.reorder(rows)


def test_rows_join_and_leave(model: Model) -> None:
    assert_rows_join(model, 1e-5)


def test_what_was_in_memory_before_means_nothing(
    portable_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns that no row has written are masked, and still multiplied."""
    zeros = append.aligned_zeros

    def spoiled(*arguments: Any) -> Any:
        arrays = zeros(*arguments)
        spoil_views(arrays)
        return arrays

    monkeypatch.setattr(append, "aligned_zeros", spoiled)
    with neo_runtime.load(portable_bundle, threads=1) as model:
        assert_rows_join(model, 1e-5)
        assert_prefixes_hold(model, 1e-5)
        assert_beginnings_hold(model, 1e-5)
        assert_crops_hold(model, 1e-5)


def test_positions_are_taken_away(model: Model) -> None:
    assert_crops_hold(model, 1e-5)


def test_scores_go_through_the_graph_in_chunks(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    make = BoundCall.__init__

    def watched(call: BoundCall, backend: Any, graph: str, **arrays: Any) -> None:
        sizes.append(arrays["input_ids"].size)
        make(call, backend, graph, **arrays)

    monkeypatch.setattr(BoundCall, "__init__", watched)
    ids = [5 + 3 * place for place in range(20)]
    expected = model.logits(ids)
    for chunk, at_once in ((8, 512), (512, 8)):
        monkeypatch.setattr(model, "prefill_chunk", chunk)
        monkeypatch.setattr(model._backend, "scored_at_once", at_once)
        del sizes[:]
        with model.new_cache(1, 20) as cache:
            assert relative_error(model.logits(ids, cache), expected) < 1e-5
        assert sizes == [8, 8, 4]


def test_what_was_evicted_does_not_come_back(model: Model) -> None:
    """A local layer of the demo model holds 80 positions, and 64 after a move to the front."""
    evicts = model.manifest.cache.layout == "in_place"
    with model.new_cache(1, 100) as cache:
        model.prefill(cache, [[1] * 79])
        assert cache.room_to_crop == (1 if evicts else 21)
        model.prefill(cache, [[1, 2]])
        assert cache.room_to_crop == (16 if evicts else 19)
        if evicts:
            with pytest.raises(RequestError, match=r"crop got 80, .* of 81 positions .* no longer"):
                cache.crop(80)
        cache.crop(81)
        cache.crop(1000)
        cache.crop(10**30)
        cache.crop(np.uint64(81))  # type: ignore[arg-type]
        assert cache.lengths.dtype == np.int64
        assert cache.lengths.tolist() == [81]
        model.decode(cache, [3])
        cache.crop(81)
        for wrong in (-1, 2.0, True):
            with pytest.raises(
                RequestError, match=r"length is .*, expected an integer of at least 0"
            ):
                cache.crop(wrong)  # type: ignore[arg-type]
        with pytest.raises(
            ContextLengthError, match="sequence 0 has 81 positions and would have 101"
        ):
            model.logits([1] * 20, cache)
    with model.new_cache(2, 8) as cache:
        with pytest.raises(RequestError, match="cache of 2 sequences, expected one"):
            model.logits([1], cache)
        cache.reorder([])
        cache.crop(0)
        assert cache.room_to_crop == 8


def test_rows_that_cannot_join(model: Model) -> None:
    with model.new_cache(3, 8) as cache:
        cache.reorder([0])
        for wrong in (0, 1.5, True):
            with pytest.raises(RequestError, match=r"sequences is .* integer of at least 1"):
                cache.extend(wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="got 3 sequences, expected at most 2: 1 of the 3"):
            cache.extend(3)
        cache.extend(1)
        for rows, prompts, message in (
            ([1, 0], [[1], [2]], "each once, in ascending order"),
            ([1, 1], [[1], [2]], "each once, in ascending order"),
            ([0], [[1], [2]], "2 prompts for 1 rows, expected one for each"),
            ([], [], "0 prompts for 0 rows"),
            ([2], [[1]], "prefill got rows [2], expected 0 to 1"),
            ([0], [[]], "prompt is empty"),
            (None, [[1]], "1 prompts for a cache of 2 sequences"),
        ):
            with pytest.raises(RequestError, match=re.escape(message)):
                model.prefill(cache, prompts, rows)
        model.prefill(cache, [[1] * 8], rows=[1])
        with pytest.raises(ContextLengthError, match="sequence 1 has 8 positions and would have 9"):
            model.prefill(cache, [[1]], rows=[1])
        assert cache.lengths.tolist() == [0, 8]
        cache.reorder([])
        with pytest.raises(RequestError, match="prompt is empty"):
            model.decode(cache, [])


def test_other_rows_stay_where_they_are(mini_bundle: Path) -> None:
    """A row that ends is replaced by the last one: nothing else is copied."""
    from neo_runtime.generation.generator import fill_holes

    assert fill_holes([0, 1, 2]) == [0, 1, 2]
    assert fill_holes([1, 2, 3]) == [3, 1, 2]
    assert fill_holes([2, 5]) == [2, 5]
    assert fill_holes([0, 4, 5, 2]) == [0, 4, 2, 5]


def test_decode_binds_once_and_writes_in_place(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []

    class Counted(BoundCall):
        def __init__(self, backend: OnnxRuntimeBackend, graph: str, **arrays: Any) -> None:
            bound.append(graph)
            super().__init__(backend, graph, **arrays)

    monkeypatch.setattr(in_place, "BoundCall", Counted)
    with neo_runtime.load(mini_bundle, threads=1) as model, model.new_cache(2, 16) as cache:
        logits = model.prefill(cache, [[1, 2], [3]])
        first = model.decode(cache, [4, 5])
        kept = first.copy()
        second = model.decode(cache, [6, 7])
        assert second.ctypes.data == first.ctypes.data == logits.ctypes.data
        assert not np.array_equal(kept, second)
        cache.reorder([1, 0])
        model.decode(cache, [6, 7])
        assert bound == ["prefill", "decode"]
        cache.reorder([1])
        model.decode(cache, [4])
        assert bound == ["prefill", "decode", "decode"]
