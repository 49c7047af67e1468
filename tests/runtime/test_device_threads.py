"""What a device's memory and CUDA graphs cost with many threads, sizes and models."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.host_device import HostDevice
from helpers.kills import fork
from neo_runtime.backends.choice import Chosen
from neo_runtime.backends.cuda import backend as cuda_backend
from neo_runtime.backends.cuda.backend import CudaBackend
from neo_runtime.backends.cuda.one_thread import OneThread, _Job
from neo_runtime.backends.cuda.sessions import CudaSessions
from neo_runtime.backends.device import locks as device_locks
from neo_runtime.backends.device.leftovers import Leftovers
from neo_runtime.backends.device.locks import alone, between_captures, new_lock
from neo_runtime.bundle.folder import open_bundle
from neo_runtime.errors import DeviceMemoryError, NeoError
from neo_runtime.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Runs:
    """Decode runs of onnxruntime: the session, the thread and the CUDA graph of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[int, str, int]] = []
        self.sessions: list[Any] = []
        run = CudaSessions.run

        def watched(sessions: CudaSessions, graph: str, binding: Any, graph_id: int = -1) -> None:
            if graph == "decode":
                session = sessions.get(graph)
                if session not in self.sessions:
                    self.sessions.append(session)
                number = self.sessions.index(session)
                self.found.append((number, threading.current_thread().name, graph_id))
            run(sessions, graph, binding, graph_id)

        monkeypatch.setattr(CudaSessions, "run", watched)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def model(cuda_bundle: Path, device: HostDevice) -> Iterator[Model]:
    opened = open_bundle(cuda_bundle)
    with Model(opened, Chosen(CudaBackend(opened, device), "cuda", None)) as model:
        yield model


def in_thread(work: Callable[[], object], name: str = "request") -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join()


def test_requests_of_many_threads_decode_in_one(model: Model, runs: Runs) -> None:
    """onnxruntime keeps handles and graphs for each thread that ever ran a captured session."""
    request = partial(model.generate, "Once", max_new_tokens=3)
    for _ in range(2):
        request()
    here = threading.current_thread().name
    assert {name for _, name, _ in runs.found} == {here}
    assert len({graph for _, _, graph in runs.found}) == 1
    runs.found.clear()
    for number in range(5):
        in_thread(request, f"request {number}")
    request()
    assert {name for _, name, _ in runs.found} == {"neo-decode"}
    assert len({graph for _, _, graph in runs.found}) == 1


def test_graphs_are_let_go_of_with_their_session(
    model: Model, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_backend, "_MOST_GRAPHS", 3)
    generate = partial(model.generate, max_new_tokens=3)
    expected = [completion.text for completion in generate(["Once", "The"])]
    runs.found.clear()
    cache = model.new_cache(1, 16)
    model.prefill(cache, [[1, 2, 3]])
    kept = [model.decode(cache, [4])]
    for _ in range(3):
        for batch in (2, 3, 4, 5):
            texts = [completion.text for completion in generate((["Once", "The"] * 3)[:batch])]
            assert texts[:2] == expected
    kept.append(model.decode(cache, [5]))
    other = model.new_cache(1, 16)
    model.prefill(other, [[1, 2, 3]])
    np.testing.assert_array_equal(kept, [model.decode(other, [4]), model.decode(other, [5])])
    captured: dict[int, set[int]] = {}
    for session, _, graph in runs.found:
        captured.setdefault(session, set()).add(graph)
    assert len(captured) > 2
    assert max(len(graphs) for graphs in captured.values()) <= 3


def test_sizes_in_turn_are_not_captured_again(model: Model, runs: Runs) -> None:
    for _ in range(3):
        for batch in range(1, 4):
            model.generate(["Once"] * batch, max_new_tokens=3)
    assert len({graph for _, _, graph in runs.found}) == 3


def test_a_capture_is_alone(
    model: Model, cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other models wait, as what they allocate would spoil it; afterwards they do not."""
    opened = open_bundle(cuda_bundle)
    other = CudaBackend(opened, HostDevice())
    held: list[bool] = []
    run = CudaSessions.run

    def watched(sessions: CudaSessions, graph: str, binding: Any, graph_id: int = -1) -> None:
        if graph == "decode":
            held.append(other.lock.locked())
        run(sessions, graph, binding, graph_id)

    monkeypatch.setattr(CudaSessions, "run", watched)
    model.generate("Once", max_new_tokens=4)
    assert held == [True, False, False]
    other.close()


def test_two_that_capture_do_not_wait_for_each_other() -> None:
    locks = [new_lock(), new_lock()]
    turns: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            with locks[number], alone(locks[number]):
                assert locks[0].locked()
                assert locks[1].locked()
                turns.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(turns) == 400
    assert not locks[0].locked()
    assert not locks[1].locked()


def test_who_captures_passes_over_those_that_wait_for_it() -> None:
    """They hold their locks until it has ended: nobody would ever go on."""
    locks = [new_lock() for _ in range(3)]
    holding = threading.Barrier(3)
    begun, ended = threading.Event(), []

    def work(number: int) -> None:
        with locks[number]:
            if number:
                holding.wait()
                begun.wait()
            with alone(locks[number]):
                ended.append(number)

    # Daemons: a failure would keep the tests from ever ending.
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(3)]
    threads[1].start()
    threads[2].start()
    holding.wait()
    threads[0].start()
    while not device_locks._capturing.locked():
        time.sleep(0.001)
    begun.set()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(ended) == [0, 1, 2]


class Interrupted:
    """An event whose waits are interrupted by Ctrl-C so many times."""

    def __init__(self, times: int) -> None:
        self.event, self.times = threading.Event(), times

    def wait(self) -> bool:
        if self.times:
            self.times -= 1
            raise KeyboardInterrupt
        return self.event.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.event, name)


@pytest.mark.parametrize("times", [1, 3])
def test_interrupted_work_ends_before_its_caller_goes_on(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, begun, ended = OneThread(), threading.Event(), threading.Event()
    one.run(lambda: None)
    init = _Job.__init__

    def interrupted(job: _Job, work: Callable[[], None]) -> None:
        init(job, work)
        job._done = Interrupted(times)  # type: ignore[assignment]
        job.wait = lambda: begun.wait() and job._done.wait()  # type: ignore[method-assign,assignment,return-value]

    monkeypatch.setattr(_Job, "__init__", interrupted)

    def work() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    caught: list[bool] = []

    def call() -> None:
        try:
            one.run(work)
        except KeyboardInterrupt:
            caught.append(ended.is_set())

    in_thread(call)
    assert caught == [True]
    one.close()


def test_work_that_has_not_begun_is_not_done_later() -> None:
    done: list[int] = []
    job = _Job(lambda: done.append(1))
    job.abandon()
    job.do()
    assert done == []


def test_an_error_of_the_worker_is_the_callers() -> None:
    one = OneThread()
    one.run(lambda: None)

    def call() -> None:
        with pytest.raises(ZeroDivisionError):
            one.run(lambda: 1 // 0 and None)

    in_thread(call)
    one.close()


def test_threads_that_outlive_the_main_one_still_decode() -> None:
    code = """if True:
        import threading, time
        from neo_runtime.backends.cuda.one_thread import OneThread, _Job
        one = OneThread()
        one.run(lambda: None)
        def late():
            time.sleep(0.5)
            one.run(lambda: print("done", flush=True))
        threading.Thread(target=late).start()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_cache_closed_in_the_middle_of_a_step_stays_its_own(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot goes to another request only when the step has ended."""
    cache = model.new_cache(1, 16)
    model.prefill(cache, [[1, 2, 3]])
    run, seen = CudaSessions.run, []
    backend = model._backend
    assert isinstance(backend, CudaBackend)

    def closing(sessions: CudaSessions, graph: str, binding: Any, graph_id: int = -1) -> None:
        in_thread(cache.close)
        seen.append((cache.closed, len(backend.slots._taken)))
        run(sessions, graph, binding, graph_id)

    monkeypatch.setattr(CudaSessions, "run", closing)
    with pytest.raises(NeoError, match="the cache is closed"):  # its logits are the slot's
        model.decode(cache, [4])
    assert seen == [(True, 1)]
    assert backend.slots._taken == []
    assert model.cache_bytes_in_use == 0


def test_a_model_dropped_while_its_device_is_in_use(cuda_bundle: Path) -> None:
    """What waits for the device does not keep the model from being garbage."""
    device = HostDevice()
    opened = open_bundle(cuda_bundle)
    model = Model(opened, Chosen(CudaBackend(opened, device), "cuda", None))
    cache = model.new_cache(1, 16)
    mine = new_lock()
    with mine, alone(mine):
        cache.close()
        del cache, model
        gc.collect()
        assert not device.closed
    Leftovers(mine).settle()
    assert device.closed


def test_an_interrupt_while_a_slot_is_cleared_loses_none(
    model: Model, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(address: int, size: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(device, "zero", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.new_cache(1, 16)
    model.close()
    assert device.closed


def test_idle_slots_make_room_for_whatever_needs_it(model: Model, device: HostDevice) -> None:
    def fill() -> None:
        device.capacity = None
        for batch in range(1, 4):
            model.generate(["Once"] * batch, max_new_tokens=2)
        device.capacity = device.in_use + 100

    fill()
    assert len(model.logits([1, 2, 3])) == 3
    device.capacity = None
    cache = model.new_cache(2, 16)
    model.prefill(cache, [[1], [2]])
    fill()
    cache.reorder([1, 0])  # needs a block for the rows that move
    fill()
    model.prefill(cache, [[1], [2]])
    device.capacity = None


def test_a_run_that_lacks_memory_is_tried_without_idle_slots(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.logits([1, 2, 3])
    run, failed = CudaSessions.run, []

    def short(sessions: CudaSessions, graph: str, binding: Any, graph_id: int = -1) -> None:
        if graph == "score" and backend.slots._idle:
            failed.append(graph)
            raise DeviceMemoryError("no memory for activations")
        run(sessions, graph, binding, graph_id)

    backend = model._backend
    assert isinstance(backend, CudaBackend)
    model.generate(["Once"] * 2, max_new_tokens=2)
    monkeypatch.setattr(CudaSessions, "run", short)
    np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)
    assert failed == ["score"]


def test_nothing_of_an_earlier_request_is_left(model: Model) -> None:
    """A masked slot may still be multiplied by 0, and what was there may not have been finite."""
    for _ in range(2):
        store = model._backend.open_cache(2, 16)
        assert all((held == 0).all() for held in store.contents())
        store.spoil()
        assert not any((held == 0).any() for held in store.contents())
        store.close()


def test_a_model_that_is_garbage_gives_everything_back(cuda_bundle: Path) -> None:
    device = HostDevice()
    opened = open_bundle(cuda_bundle)
    model = Model(opened, Chosen(CudaBackend(opened, device), "cuda", None))
    model.generate("Once", max_new_tokens=3)
    cache = model.new_cache(1, 16)
    del model
    gc.collect()
    assert not device.closed, "a cache still has its slot"
    del cache
    gc.collect()
    assert device.closed


def test_garbage_during_a_capture_is_given_back_afterwards() -> None:
    """Its lock is held by the model that captures, and nobody will ask for it again."""
    mine, garbage = new_lock(), new_lock()
    done: list[int] = []
    owner = threading.Event()  # whose place any object may take
    Leftovers(garbage).at_end_of(owner, lambda: done.append(1))
    with mine, alone(mine):
        del owner
        gc.collect()
        assert done == []
    Leftovers(mine).settle()
    assert done == [1]


def test_a_device_is_not_opened_while_another_captures() -> None:
    lock, order = new_lock(), list[str]()

    def open_another() -> None:
        with between_captures():
            order.append("opened")

    thread = threading.Thread(target=open_another)
    with lock, alone(lock):
        thread.start()
        thread.join(timeout=0.2)
        order.append("captured")
    thread.join(timeout=60)
    assert order == ["captured", "opened"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_waits_for_no_capture_of_its_parent() -> None:
    """Who holds the locks of all devices is not there."""
    lock = new_lock()

    def child() -> None:
        signal.alarm(60)
        with between_captures(), new_lock():
            pass

    with lock, alone(lock):
        pid = fork(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
