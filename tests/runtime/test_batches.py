"""Requests that are large, or that nobody waits for any more."""

from __future__ import annotations

import threading
import tracemalloc
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import CacheLimitError, ContextLengthError, NeoError, RequestError
from neo_runtime.generation.rows import make_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.generation.rows import Row
    from neo_runtime.model import Model


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        yield model


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each cache that is made."""
    found: list[int] = []
    new_cache = CachedModel.new_cache

    def watched(self: CachedModel, batch: int, length: int) -> KVCache:
        found.append(batch)
        return new_cache(self, batch, length)

    monkeypatch.setattr(CachedModel, "new_cache", watched)
    return found


def after(steps: int) -> Callable[[], bool]:
    """A `should_stop` that says so after some steps of a first batch."""
    asked = count(0)
    return lambda: next(asked) >= steps


def test_many_prompts_go_in_batches(model: Model, batches: list[int]) -> None:
    prompts = [[1 + n % 5] * (1 + n % 7) for n in range(40)]
    found = model.generate(prompts, max_new_tokens=3)
    assert batches == [14, 13, 13]
    del batches[:]
    assert [c.token_ids for c in model.generate(prompts, max_new_tokens=3, batch_size=40)] == [
        completion.token_ids for completion in found
    ]
    assert batches == [40]
    del batches[:]
    model.generate(prompts[:5], max_new_tokens=3, num_return_sequences=6, do_sample=True)
    assert batches == [12, 12, 6]
    del batches[:]
    model.generate(prompts[:2], max_new_tokens=3, num_return_sequences=20, do_sample=True)
    assert batches == [20, 20]


def test_seeds_belong_to_prompts_in_whatever_batch(model: Model, batches: list[int]) -> None:
    prompts = [[5] * n for n in (9, 2, 7, 3)]
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "seed": (1, 2, 3, 4)}
    together = model.generate(prompts, **options)
    apart = model.generate(prompts, **options, batch_size=1)
    assert [c.token_ids for c in together] == [c.token_ids for c in apart]
    del batches[:]
    for others in ([*prompts, [5] * 20], prompts[:3], prompts[:1]):
        count = f"seed has 4 entries for {len(others)} prompt"
        with pytest.raises(RequestError, match=count):
            model.generate(others, **options, batch_size=1)
    assert batches == [], "before any work"
    with pytest.raises(RequestError, match="seed has 4 entries for 1 prompt;"):
        model.stream(prompts[0], **options)


def test_rows_are_let_go_with_their_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers may hold as much as a row of logits each."""
    rows: weakref.WeakSet[Row] = weakref.WeakSet()
    most = 0

    def counted(*given: Any, **named: Any) -> list[Row]:
        nonlocal most
        made = make_rows(*given, **named)
        rows.update(made)
        most = max(most, len(rows))
        return made

    monkeypatch.setattr("neo_runtime.generation.batches.make_rows", counted)
    found = model.generate([[5, n] for n in range(40)], max_new_tokens=3, batch_size=4)
    assert len(found) == 40
    assert most <= 8, "of a batch, and of the one before it"


def test_an_error_names_its_prompt(model: Model) -> None:
    def forbids(ids: Any, scores: Any) -> Any:
        return scores - np.inf if ids[0] == 7 else scores

    prompts = [[5, 6], [7, 6], [5, 8]]
    for options in ({}, {"batch_size": 1}, {"drafter": neo_runtime.PromptLookup()}):
        with pytest.raises(RequestError, match=r"^prompts\[1\]: the options forbid every token"):
            model.generate(prompts, max_new_tokens=4, logits_processor=[forbids], **options)
    with pytest.raises(RequestError, match=r"^the options forbid every token"):
        model.generate(prompts[1], max_new_tokens=4, logits_processor=[forbids])
    with pytest.raises(RequestError, match=r"^prompts\[1\]: the options forbid every"):
        model.generate(prompts, max_new_tokens=4, num_beams=2, logits_processor=[forbids])


def test_batches_fit_what_the_limit_leaves(mini_bundle: Path, batches: list[int]) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        one = model.cache_bytes(1, 16)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=5 * one) as model:
        assert model.cache_bytes_left == 5 * one
        assert len(model.generate([[1]] * 9, max_new_tokens=3)) == 9
        assert batches == [3, 3, 3]
        del batches[:]
        copies: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
        assert len(model.generate([[1]] * 6, max_new_tokens=3, **copies)) == 12
        assert batches == [4, 4, 4]
        with pytest.raises(CacheLimitError):
            model.generate([[1]] * 9, max_new_tokens=3, batch_size=9)


@pytest.mark.parametrize("options", [{"num_return_sequences": 1_000_000}, {"num_beams": 200_000}])
def test_too_much_is_refused_before_any_work(options: dict[str, int], mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=1 << 20) as model:
        model.prepare()
        tracemalloc.start()
        try:
            with pytest.raises(CacheLimitError):
                model.generate(
                    [1], max_new_tokens=400, do_sample="num_beams" not in options, **options
                )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1e6


def test_every_prompt_is_looked_at_before_any_work(model: Model, batches: list[int]) -> None:
    with pytest.raises(ContextLengthError, match=r"prompts\[20\]"):
        model.generate([*[[1]] * 20, [1] * 600], max_new_tokens=3)
    assert batches == []


def test_a_number_of_sequences_by_name_gives_a_list(model: Model) -> None:
    one = model.generate([1, 2], max_new_tokens=3, num_return_sequences=1)
    assert [c.token_ids for c in one] == [model.generate([1, 2], max_new_tokens=3).token_ids]


def test_who_stops_waiting_stops_the_work(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 50, "ignore_eos": True}
    whole = model.generate(["Once", "The"], **options)
    found = model.generate(["Once", "The"], **options, should_stop=after(4))
    for cut, full in zip(found, whole, strict=True):
        assert (cut.finish_reason, cut.token_ids) == ("cancelled", full.token_ids[:4])
        assert cut.text == model.tokenizer.decode(cut.token_ids)  # type: ignore[union-attr]
    assert model.generate("Once", **options, should_stop=after(50)).finish_reason == "length"
    assert model.cache_bytes_in_use == 0


def test_batches_are_not_begun_for_nobody(model: Model, batches: list[int]) -> None:
    found = model.generate([[1]] * 20, max_new_tokens=9, ignore_eos=True, should_stop=after(2))
    assert [len(c.token_ids) for c in found] == [2] * 10 + [0] * 10
    assert {c.finish_reason for c in found} == {"cancelled"}
    assert batches == [10]
    stopped = threading.Event()
    stopped.set()
    del batches[:]
    for options in ({}, {"num_beams": 2}):
        [one] = model.generate([[1]], should_stop=stopped.is_set, **options)
        assert (one.text, one.token_ids, one.finish_reason) == ("", (), "cancelled")
    assert batches == []


def test_a_beam_search_ends_with_the_next_step(model: Model) -> None:
    options: dict[str, Any] = {"num_beams": 3, "ignore_eos": True}
    expected = model.generate("Once", **options, max_new_tokens=5)
    found = model.generate("Once", **options, max_new_tokens=40, should_stop=after(4))
    assert (found.token_ids, found.finish_reason) == (expected.token_ids, "cancelled")
    assert expected.finish_reason == "length"


def test_a_stream_that_is_cancelled_gives_what_it_held_back(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 50, "ignore_eos": True}
    whole = model.generate("Once", **options)
    assert whole.text is not None
    stop = whole.text[5:9] + "never"
    with model.stream("Once", **options, stop=stop, should_stop=after(4)) as stream:
        text = "".join(stream)
        assert stream.completion.finish_reason == "cancelled"
        assert stream.completion.text == text
        assert whole.text.startswith(text)


def test_closing_a_stream_stops_it_where_no_text_comes(model: Model) -> None:
    """Bytes of characters that never end: one piece is asked for, and many tokens pass."""
    assert model.tokenizer is not None
    [byte, *_] = model.tokenizer.encode("\N{GRINNING FACE}")
    taken: list[object] = []

    def watch() -> bool:
        taken.append(None)
        if len(taken) == 3:
            stream.close()  # as another thread would, in the middle of a piece
        return False

    options: dict[str, Any] = {"logit_bias": {byte: 1e4}, "max_new_tokens": 200}
    stream = model.stream("Once", **options, should_stop=watch)
    assert list(stream) == []
    assert len(taken) <= 4
    with pytest.raises(NeoError):
        _ = stream.completion
    assert model.cache_bytes_in_use == 0


def test_loading_graphs_is_not_measured(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        clock = iter(np.arange(10_000.0))

        loaded: list[float] = []

        def slow(graphs: object) -> None:
            loaded.append(next(clock))
            for _ in range(1000):
                next(clock)

        monkeypatch.setattr(model._backend, "prepare", slow)
        monkeypatch.setattr("neo_runtime.generation.rows.perf_counter", lambda: next(clock))
        for number, options in enumerate(({}, {"num_beams": 2}), start=1):
            found = model.generate([1], max_new_tokens=2, **options)
            assert 0 < found.timings.time_to_first_token < 100
            assert len(loaded) == number, "or the first request's clock has it"
        model.generate([1], max_new_tokens=1)
        assert len(loaded) == 2, "one token needs no decode graph"
