"""Several threads on one model: each gets what it would get alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import neo_runtime
import pytest
from helpers.hf_reference import heldout_texts
from helpers.kills import fork
from neo_runtime.backends.cpu import prepacked, unused_memory
from neo_runtime.backends.cpu.sessions import SessionFactory
from neo_runtime.errors import NeoError

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_forked_child_has_sessions_of_its_own(mini_bundle: Path) -> None:
    """Its parent's threads are not there: computing would use one, and the end wait for them."""
    with neo_runtime.load(mini_bundle, threads=3) as model:
        expected = model.generate("Tom", max_new_tokens=9).text
        cache = model.new_cache(1, 8)
        model.prefill(cache, [[1, 2]])

        def child() -> None:
            signal.alarm(60)
            assert model.generate("Tom", max_new_tokens=9).text == expected
            assert len(list(Path("/proc/self/task").iterdir())) >= 3
            cache.close()
            model.close()

        pid = fork(child)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert model.generate("Tom", max_new_tokens=9).text == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="locks of files")
def test_a_child_waits_for_no_lock_of_its_parents_threads(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that loading a graph takes: who held them is not there."""
    folder = tmp_path / "cache"
    folder.mkdir()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        ledger, lock = model._ledger, folder / "lock"
        with unused_memory._one_at_a_time, ledger._lock, prepacked._locked(lock):
            held.set()
            assert done.wait(timeout=120)

    def child() -> None:
        signal.alarm(60)
        with (
            unused_memory._one_at_a_time,
            model.new_cache(1, 8) as cache,
            prepacked._locked(folder / "other"),
        ):
            model.prefill(cache, [[1]])

    with neo_runtime.load(mini_bundle, threads=2) as model:
        closed = neo_runtime.load(mini_bundle, threads=2)
        kept = closed.new_cache(1, 8)
        closed.prefill(kept, [[1]])
        closed.decode(kept, [2])
        closed.close()  # its cache holds a session all the same
        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(timeout=60)
        pid = fork(child)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        # Nor does a child that lives on keep the file's lock from others.
        pid = fork(lambda: signal.pause())
        done.set()
        thread.join()
        try:
            with prepacked._locked(folder / "lock"):
                pass
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_child_that_ends_waits_for_nobody(mini_bundle: Path) -> None:
    script = """
import os, signal, sys, neo_runtime
model, closed = (neo_runtime.load(sys.argv[1], threads=2) for _ in range(2))
model.generate("Tom", max_new_tokens=3)
cache = closed.new_cache(1, 8)
closed.prefill(cache, [[1]])
closed.decode(cache, [2])
closed.close()
if os.fork() == 0:
    signal.alarm(60)
    sys.exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(mini_bundle)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


def test_what_lies_on_a_gpu_does_not_survive_a_fork(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        model.backend = "cuda"
        assert model.generate("Tom", max_new_tokens=1).text
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(NeoError, match=r"does not survive a fork; call neo_runtime.load"):
            model.generate("Tom")
