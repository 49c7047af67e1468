"""Several threads on one model: each gets what it would get alone."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import neo_runtime
import pytest
from helpers.hf_reference import heldout_texts
from neo_runtime.backends.sessions import SessionFactory
from neo_runtime.errors import NeoError

if TYPE_CHECKING:
    from pathlib import Path

THREADS = 8


def requests() -> list[tuple[Any, dict[str, Any]]]:
    """Greedy, sampled, beams and a batch, with and without stop strings."""
    texts = [text[: 10 + 17 * i] for i, text in enumerate(heldout_texts()[:THREADS])]
    sampled = {"do_sample": True, "max_new_tokens": 30}
    kinds: list[dict[str, Any]] = [
        {"max_new_tokens": 30},
        sampled | {"seed": 1},
        sampled | {"seed": 2, "top_k": 0, "repetition_penalty": 1.2},
        {"num_beams": 3, "max_new_tokens": 20},
        {"max_new_tokens": 30, "stop": ["."]},
        sampled | {"seed": 3, "num_return_sequences": 3},
    ]
    found: list[tuple[Any, dict[str, Any]]] = [
        (text, kinds[i % len(kinds)] | {"no_repeat_ngram_size": i % 3})
        for i, text in enumerate(texts * 2)
    ]
    return [*found, (texts, sampled | {"seed": 4}), (texts, kinds[0])]


def results(found: Any) -> list[tuple[Any, ...]]:
    completions = found if isinstance(found, list) else [found]
    return [(c.text, c.token_ids, c.finish_reason, c.score) for c in completions]


@pytest.mark.parametrize("layout", ["mini_bundle", "portable_bundle"])
def test_threads_at_once_get_the_same_as_one_after_the_other(
    layout: str, request: pytest.FixtureRequest
) -> None:
    with neo_runtime.load(request.getfixturevalue(layout), threads=2) as model:
        work = requests()
        expected = [results(model.generate(prompt, **options)) for prompt, options in work]
        barrier = threading.Barrier(THREADS)

        def run(first: int) -> dict[int, list[tuple[Any, ...]]]:
            barrier.wait()
            order = [(first * 5 + i) % len(work) for i in range(0, len(work), 2)]
            return {i: results(model.generate(work[i][0], **work[i][1])) for i in order}

        with ThreadPoolExecutor(THREADS) as pool:
            done = list(pool.map(run, range(THREADS)))
        assert {i for found in done for i in found} == set(range(len(work)))
        for found in done:
            for i, result in found.items():
                assert result == expected[i], work[i]
        assert model.cache_bytes_in_use == 0


def test_streams_of_several_threads_do_not_mix(mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        texts = heldout_texts()[:THREADS]
        expected = [model.generate(text[:40], max_new_tokens=40).text for text in texts]
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda t: "".join(model.stream(t[:40], max_new_tokens=40)), texts)
            assert list(found) == expected


def test_each_graph_is_loaded_once(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = SessionFactory.session

    def counted(self: SessionFactory, graph: str) -> Any:
        loaded.append(graph)
        return load(self, graph)

    monkeypatch.setattr(SessionFactory, "session", counted)
    with neo_runtime.load(mini_bundle, threads=1) as model:
        assert loaded == []
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda i: model.generate([i + 1], max_new_tokens=3), range(THREADS)))
        assert sorted(loaded) == ["decode", "prefill"]
        model.logits([1])
        assert sorted(loaded) == ["decode", "prefill", "score"]


@pytest.mark.parametrize(("threads", "lines"), [(2, 1), (1, 0)])
def test_a_child_process_is_told_what_it_lacks(
    threads: int,
    lines: int,
    mini_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with neo_runtime.load(mini_bundle, threads=threads) as model:
        expected = model.generate("Tom", max_new_tokens=3).text
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with caplog.at_level(logging.WARNING, "neo_runtime"):
            for _ in range(2):
                assert model.generate("Tom", max_new_tokens=3).text == expected
        assert [r.getMessage().count("before a fork") for r in caplog.records] == [1] * lines
        monkeypatch.setattr(os, "getpid", lambda: -2)
        model.backend = "cuda"
        with pytest.raises(NeoError, match=r"does not survive a fork; call neo_runtime.load"):
            model.generate("Tom")
