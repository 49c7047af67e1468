"""Continuous batching: requests that share steps get what each gets alone."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError
from itertools import count
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
import pytest
from helpers.hf_reference import heldout_texts, reference_continuations, varied_prompts
from helpers.holding import holding
from helpers.kills import fork
from neo_runtime import Scheduler
from neo_runtime.backends.cpu.binding import BoundCall
from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import CacheLimitError, ContextLengthError, NeoError, RequestError
from neo_runtime.generation.rows import make_rows
from neo_runtime.scheduling.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.generation.completion import Completion
    from neo_runtime.model import Model
    from neo_runtime.scheduling.pending import PendingCompletion


@pytest.fixture(scope="module")
def model(mini_bundle: Path) -> Iterator[Model]:
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        yield loaded


class Steps:
    """The tokens that were fed to each call, prompts and decode steps; calls can be held up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefilled: list[list[int]] = []
        self.decoded: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        prefill, decode = CachedModel.prefill_step, CachedModel.decode_step

        def prefill_step(model: CachedModel, cache: KVCache, prompts: Any, rows: Any = None) -> Any:
            self.wait()
            self.prefilled.append([len(prompt) for prompt in prompts])
            return prefill(model, cache, prompts, rows)

        def decode_step(model: CachedModel, cache: KVCache, tokens: Sequence[int]) -> Any:
            self.wait()
            self.decoded.append(len(tokens))
            return decode(model, cache, tokens)

        monkeypatch.setattr(CachedModel, "prefill_step", prefill_step)
        monkeypatch.setattr(CachedModel, "decode_step", decode_step)

    def wait(self) -> None:
        assert self.go_on.wait(timeout=60)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def facts(completion: Completion) -> tuple[Any, ...]:
    logprobs = [round(choice.logprob or 0.0, 3) for choice in completion.logprobs or ()]
    return completion.text, completion.token_ids, completion.finish_reason, logprobs


KINDS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {"max_new_tokens": 1},
    {"max_new_tokens": 40, "do_sample": True, "seed": 1},
    {"max_new_tokens": 25, "do_sample": True, "seed": 2, "top_k": 0, "repetition_penalty": 1.2},
    {"max_new_tokens": 30, "stop": ["."]},
    {"max_new_tokens": 12, "logprobs": 2},
    {"max_length": 250, "ignore_eos": True},
]


@pytest.mark.parametrize("bundle", ["mini_bundle", "portable_bundle", "cuda_bundle"])
def test_each_gets_what_it_gets_alone(bundle: str, request: pytest.FixtureRequest) -> None:
    work = [(text[: 9 + 11 * i], KINDS[i % len(KINDS)]) for i, text in enumerate(heldout_texts())]
    work = work[:20]
    with neo_runtime.load(request.getfixturevalue(bundle), backend="cpu", threads=2) as model:
        expected = [facts(model.generate(prompt, **options)) for prompt, options in work]
        found: list[Any] = [None] * len(work)
        with Scheduler(model, max_batch_size=5) as scheduler:

            def client(first: int) -> None:
                for index in range(first, len(work), 4):
                    prompt, options = work[index]
                    found[index] = facts(scheduler.submit(prompt, **options).result(timeout=120))

            clients = [threading.Thread(target=client, args=(first,)) for first in range(4)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            assert (scheduler.active, scheduler.waiting, scheduler.unfinished) == (0, 0, 0)
        assert model.cache_bytes_in_use == 0
    assert found == expected


def test_the_texts_of_transformers(model: Model) -> None:
    prompts = varied_prompts(10)
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    expected = reference_continuations(prompts, **options)
    with Scheduler(model, max_batch_size=3) as scheduler:
        pending = [scheduler.submit(ids, **options) for ids in prompts]
        assert [[p.result(timeout=120).token_ids] for p in pending] == expected


def test_requests_join_a_running_batch(model: Model, steps: Steps) -> None:
    """And leave it: the places are taken by those that wait, in order."""
    options: dict[str, Any] = {"ignore_eos": True}
    with Scheduler(model, max_batch_size=2) as scheduler:
        steps.go_on.clear()
        first = scheduler.submit("Once upon", max_new_tokens=9, **options)
        wait_for(lambda: scheduler.active == 1)
        others = [scheduler.submit("The dog", max_new_tokens=3, **options) for _ in range(3)]
        assert scheduler.waiting == 3
        steps.go_on.set()
        for pending in [*others, first]:
            pending.result(timeout=60)
    # The first alone once; then with one other after the other, each of them for two steps.
    assert steps.decoded == [1, 2, 2, 2, 2, 2, 2, 1]
    assert [len(prompts) for prompts in steps.prefilled] == [1, 1, 1, 1]


def test_prompts_that_begin_between_two_steps_are_few(mini_bundle: Path, steps: Steps) -> None:
    with (
        neo_runtime.load(mini_bundle, threads=1, prefill_chunk=20) as model,
        Scheduler(model, max_batch_size=8) as scheduler,
    ):
        steps.go_on.clear()
        sizes = (3, 30, 8, 8, 8)
        pending = [scheduler.submit([5] * n, max_new_tokens=5, ignore_eos=True) for n in sizes]
        wait_for(lambda: scheduler.active > 0)
        steps.go_on.set()
        for one in pending:
            one.result(timeout=60)
    assert steps.prefilled == [[3], [20], [8, 8], [10], [8]]
    assert steps.decoded[:4] == [1, 1, 3, 5]


def test_what_a_prefix_holds_counts_for_nothing(mini_bundle: Path, steps: Steps) -> None:
    with (
        neo_runtime.load(mini_bundle, threads=1, prefill_chunk=20) as model,
        model.prefix([5] * 50) as prefix,
        Scheduler(model, max_batch_size=8) as scheduler,
    ):
        del steps.prefilled[:]
        steps.go_on.clear()
        first = scheduler.submit([5, 6], max_new_tokens=9, ignore_eos=True)
        wait_for(lambda: scheduler.active > 0)
        pending = [
            scheduler.submit([7] * 8, max_new_tokens=2, ignore_eos=True, prefix=prefix)
            for _ in range(3)
        ]
        steps.go_on.set()
        for one in (first, *pending):
            one.result(timeout=60)
    assert steps.prefilled == [[2], [8, 8], [8]]


def test_the_text_as_it_comes(model: Model) -> None:
    with Scheduler(model, max_batch_size=2) as scheduler:
        pending = scheduler.submit("Once upon a time", max_new_tokens=30)
        other = scheduler.submit("The", max_new_tokens=10)
        read = list(pending)
        assert list(pending) == [], "they are given once"
        assert len(read) > 5
        assert "".join(read) == pending.result().text
        assert "".join(other) == other.result().text
        timings = pending.result().timings
        assert 0 < timings.prefill_seconds <= timings.time_to_first_token
        assert timings.tokens_per_second > 0


def test_nobody_waits_any_more(model: Model, steps: Steps) -> None:
    """`cancel` drops a request, `should_stop` ends it with the text so far; waiting ones too."""
    asked = count()
    with Scheduler(model, max_batch_size=2) as scheduler:
        steps.go_on.clear()
        options: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True}
        stopped = scheduler.submit("Tom", **options, should_stop=lambda: next(asked) >= 4)
        cancelled = scheduler.submit("The", **options)
        waiting = [
            scheduler.submit("A", **options),
            scheduler.submit("B", **options, should_stop=lambda: True),
            scheduler.submit("C", max_new_tokens=2, ignore_eos=True),
        ]
        wait_for(lambda: scheduler.active > 0)
        assert cancelled.cancel()
        assert waiting[0].cancel()
        steps.go_on.set()
        completion = stopped.result(timeout=60)
        assert completion.finish_reason == "cancelled"
        assert 0 < len(completion.token_ids) < 6
        assert completion.text == "".join(stopped)
        for one in (cancelled, waiting[0]):
            with pytest.raises(CancelledError):
                one.result(timeout=60)
            with pytest.raises(CancelledError):
                list(one)
        nothing = waiting[1].result(timeout=60)
        assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", (), "cancelled")
        assert len(waiting[2].result(timeout=60).token_ids) == 2
        assert not waiting[2].cancel(), "it has ended"
    assert sum(steps.decoded) < 40, "who was cancelled left the batch"


def test_unfinished_ones_are_counted_wherever_they_are(model: Model) -> None:
    """Those who become active are neither missed nor counted twice, at any time."""
    seen: set[int] = set()
    with Scheduler(model, max_batch_size=2) as scheduler:

        def look() -> bool:  # in the scheduler's thread, in the middle of all that it does
            seen.add(scheduler.unfinished - sum(not one.done() for one in (first, *pending)))
            return False

        with holding(scheduler, "Tom", max_new_tokens=1) as first:
            pending = [scheduler.submit("A", max_new_tokens=3, should_stop=look) for _ in range(4)]
            assert scheduler.unfinished == 5
        for one in (first, *pending):
            one.result(timeout=60)
        assert seen == {0}
        with holding(scheduler, "Tom", max_new_tokens=3):
            gone = scheduler.submit("B", max_new_tokens=3)
            assert gone.cancel()
            assert scheduler.unfinished == 2, "its sequence has not left"
        wait_for(lambda: scheduler.unfinished == 0)
        broken = scheduler.submit("The", should_stop=lambda: 1 / 0 > 0)
        with pytest.raises(ZeroDivisionError):
            broken.result(timeout=60)
        assert scheduler.unfinished == 0
    with pytest.raises(NeoError, match="scheduler is closed"):
        scheduler.submit("The")
    assert scheduler.unfinished == 0


def test_text_that_was_held_back(model: Model) -> None:
    """It may have been the beginning of a stop string; at a deadline it belongs to the text."""
    whole = model.generate("Once upon a time", max_new_tokens=12).text
    assert whole
    asked = count()
    with Scheduler(model, max_batch_size=1) as scheduler:
        pending = scheduler.submit(
            "Once upon a time",
            max_new_tokens=200,
            stop=[f"{whole}, and something that never comes"],
            should_stop=lambda: next(asked) > 6,
        )
        read = "".join(pending)
    assert read == pending.result().text
    assert read
    assert whole.startswith(read)


def test_what_one_request_does_wrong_ends_it_alone(model: Model) -> None:
    def refuse() -> bool:
        raise ZeroDivisionError("the client has gone")

    def leave() -> bool:
        raise SystemExit(3)

    def broken(ids: Any, scores: Any) -> Any:
        raise KeyError("a rule")

    def stop(*_: Any) -> Any:
        raise StopIteration

    def unsure() -> Any:
        return np.zeros(2)  # neither true nor false

    everything = tuple(range(model.manifest.model.vocab_size))
    with Scheduler(model, max_batch_size=3) as scheduler:  # so that some fail while they wait
        good = scheduler.submit("Once upon a time", max_new_tokens=20)
        bad: dict[type[BaseException], Any] = {
            ZeroDivisionError: scheduler.submit("The", should_stop=refuse),
            SystemExit: scheduler.submit("The", should_stop=leave),
            KeyError: scheduler.submit("The", logits_processor=broken),
            RuntimeError: scheduler.submit("The", should_stop=stop),
            RequestError: scheduler.submit("The", suppress_tokens=everything),
            ValueError: scheduler.submit("The", should_stop=unsure),
        }
        for kind, pending in bad.items():
            with pytest.raises(kind):
                pending.result(timeout=60)
            with pytest.raises(kind):
                list(pending)
        assert (
            good.result(timeout=60).text
            == model.generate("Once upon a time", max_new_tokens=20).text
        )


def test_a_step_that_fails_ends_those_in_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    run, calls = BoundCall.run, count()

    def fails_once(call: BoundCall) -> None:
        if next(calls) == 4:
            raise NeoError("the disk is gone")
        run(call)

    monkeypatch.setattr(BoundCall, "run", fails_once)
    with Scheduler(model, max_batch_size=2) as scheduler:
        steps.go_on.clear()
        pending = [scheduler.submit("The", max_new_tokens=9, ignore_eos=True) for _ in range(3)]
        wait_for(lambda: scheduler.active > 0)
        steps.go_on.set()
        for one in pending[:2]:
            with pytest.raises(NeoError, match="the disk is gone"):
                one.result(timeout=60)
        assert len(pending[2].result(timeout=60).token_ids) == 9, "the next one has a new cache"
        assert model.cache_bytes_in_use > 0
    assert model.cache_bytes_in_use == 0


def test_no_room_for_another_cache(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    """The requests that would need it end, and later ones find it again."""
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        size = loaded.cache_bytes(1, 64)
    with neo_runtime.load(mini_bundle, threads=1, max_cache_bytes=size) as model:
        with Scheduler(model, max_batch_size=1, max_length=64) as scheduler:
            with pytest.raises(CacheLimitError, match="in use"):
                Scheduler(model, max_batch_size=1, max_length=64)
            with monkeypatch.context() as patched:
                patched.setattr(BoundCall, "run", lambda _: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    scheduler.submit("The", max_new_tokens=4).result(timeout=60)
            with model.new_cache(1, 64), pytest.raises(CacheLimitError):
                scheduler.submit("The", max_new_tokens=4).result(timeout=60)
            assert scheduler.submit("The", max_new_tokens=4).result(timeout=60).text
        assert model.cache_bytes_in_use == 0


def test_its_limits(model: Model) -> None:
    for wrong in ({"max_batch_size": 0}, {"max_length": 1.5}):
        with pytest.raises(RequestError, match="expected an integer of at least 1"):
            Scheduler(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ContextLengthError, match="9999 positions"):
        Scheduler(model, max_length=9999)
    with Scheduler(model, max_batch_size=2, max_length=40) as scheduler:
        assert model.cache_bytes_in_use == model.cache_bytes(2, 40)
        for prompt, options, message in (
            ([5] * 30, {"max_new_tokens": 11}, "needs 41 positions, the scheduler has 40"),
            ([5] * 40, {}, "40 tokens and the scheduler 40 positions"),
        ):
            with pytest.raises(ContextLengthError, match=message):
                scheduler.submit(prompt, **options)
        for prompts, options, message in (
            (["a", "b"], {}, "submit takes one prompt"),
            ("a", {"num_beams": 2}, "submit makes one continuation"),
            ("a", {"num_return_sequences": 2, "do_sample": True}, "makes one continuation"),
            ("a", {"top_q": 2}, "top_q"),
        ):
            with pytest.raises(RequestError, match=message):
                scheduler.submit(prompts, **options)  # type: ignore[arg-type]
        exactly = scheduler.submit([5] * 30, max_new_tokens=10, ignore_eos=True)
        assert len(exactly.result(timeout=60).token_ids) == 10
        as_many_as_fit = scheduler.submit([5] * 30, ignore_eos=True)
        assert len(as_many_as_fit.result(timeout=60).token_ids) == 10


def test_the_end(model: Model, steps: Steps) -> None:
    """Leaving the block finishes what was taken; an error, or `cancel`, does not."""
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
    with Scheduler(model, max_batch_size=1) as scheduler:
        pending = [scheduler.submit("The", **options) for _ in range(2)]
    assert [len(one.result(timeout=0).token_ids) for one in pending] == [30, 30]
    with pytest.raises(NeoError, match="the scheduler is closed"):
        scheduler.submit("The")
    scheduler.close()
    steps.go_on.clear()

    def interrupted() -> None:
        with Scheduler(model, max_batch_size=1) as other:
            pending.extend(other.submit("The", **options) for _ in range(2))
            wait_for(lambda: other.active == 1)
            threading.Timer(0.1, steps.go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for one in pending[2:]:
        completion = one.result(timeout=0)
        assert completion.finish_reason == "cancelled"
        assert len(completion.token_ids) < 4
    assert model.cache_bytes_in_use == 0


def test_a_forgotten_one_finishes_and_is_gone(model: Model, steps: Steps) -> None:
    scheduler = Scheduler(model, max_batch_size=1)
    thread, gone = scheduler._batch._thread, weakref.ref(scheduler)
    steps.go_on.clear()
    pending = scheduler.submit("The", max_new_tokens=5, ignore_eos=True)
    del scheduler
    gc.collect()
    assert gone() is None
    steps.go_on.set()
    assert len(pending.result(timeout=60).token_ids) == 5
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert model.cache_bytes_in_use == 0


def test_interrupted_while_it_starts(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C: nobody has it, so nobody could close it."""
    start, started = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    with neo_runtime.load(mini_bundle, threads=1) as model:
        model.prepare()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt) as kept:
                Scheduler(model, max_batch_size=1, max_length=64, prefix_cache_bytes=2_000_000)
        [thread] = started
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert model.cache_bytes_in_use == 0
        assert kept.tb is not None, "as notebooks keep it, and with it the scheduler"


def test_the_model_is_closed_under_it(mini_bundle: Path) -> None:
    with neo_runtime.load(mini_bundle, threads=1) as model:
        scheduler = Scheduler(model, max_batch_size=1)
    with pytest.raises(NeoError, match="model is closed"):
        scheduler.submit("The")
    scheduler.close()


def run(code: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own; its first argument is the bundle."""
    return subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_may_end_with_one_running(mini_bundle: Path) -> None:
    code = (
        "import sys, neo_runtime\n"
        "model = neo_runtime.load(sys.argv[1], threads=1)\n"
        "scheduler = neo_runtime.Scheduler(model, max_batch_size=2)\n"
        "pending = scheduler.submit('Once', max_length=500, ignore_eos=True)\n"
        "print(next(pending), flush=True)\n"
    )
    ran = run(code, mini_bundle)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip()


def test_a_forked_child_makes_its_own(model: Model) -> None:
    with Scheduler(model, max_batch_size=1) as scheduler:
        done = scheduler.submit("The", max_new_tokens=2)
        done.result(timeout=60)
        with holding(scheduler, "Tom") as held:

            async def stream() -> None:
                async for _ in held:
                    pass

            def child() -> None:
                with pytest.raises(NeoError, match="made in another process"):
                    scheduler.submit("The")
                for wait in (
                    held.result,
                    held.exception,
                    lambda: list(held),
                    lambda: asyncio.run(stream()),
                ):
                    with pytest.raises(NeoError, match="submitted in another process"):
                        wait()
                assert done.result().text == "".join(done)
                scheduler.close()

            pid = fork(child)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert scheduler.submit("The", max_new_tokens=2).result(timeout=60).text


def test_in_coroutines(model: Model) -> None:
    """`asyncio.wrap_future`, `async for`, and tasks that are cancelled."""

    async def text(scheduler: Scheduler, prompt: str) -> str | None:
        completion = await asyncio.wrap_future(scheduler.submit(prompt, max_new_tokens=20))
        return completion.text

    async def stream(pending: PendingCompletion) -> str:
        return "".join([piece async for piece in pending])

    async def main() -> list[Any]:
        with Scheduler(model, max_batch_size=3) as scheduler:
            long = scheduler.submit("Tom", max_length=500, ignore_eos=True)
            longer = scheduler.submit("Tim", max_length=500, ignore_eos=True)
            tasks = [
                asyncio.ensure_future(asyncio.wrap_future(long)),
                asyncio.ensure_future(stream(longer)),
            ]
            prompts = ("Once upon a time", "The dog")
            streamed = scheduler.submit(prompts[0], max_new_tokens=20)
            found = await asyncio.gather(
                *(text(scheduler, prompt) for prompt in prompts), stream(streamed)
            )
            assert found[-1] == streamed.result().text
            for task in tasks:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0)  # the future is told in the loop's next turn
            assert long.cancelled()
            assert longer.cancelled()
            broken = scheduler.submit("The", should_stop=lambda: 1 / 0 > 0)
            with pytest.raises(ZeroDivisionError):
                await stream(broken)
            return list(found)

    first, second, streamed = asyncio.run(main())
    assert first == streamed == model.generate("Once upon a time", max_new_tokens=20).text
    assert second == model.generate("The dog", max_new_tokens=20).text


def test_a_reader_whose_loop_is_gone(model: Model) -> None:
    """Its text goes nowhere, and the others go on."""
    with Scheduler(model, max_batch_size=2) as scheduler:
        pending = scheduler.submit("Tom", max_new_tokens=100, ignore_eos=True)

        async def begin() -> None:
            pieces = aiter(pending)
            await anext(pieces)
            kept.append(pieces)

        kept: list[Any] = []
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin())
        loop.close()
        assert scheduler.submit("The", max_new_tokens=20).result(timeout=60).text
        assert len(pending.result(timeout=60).token_ids) == 100
        kept.clear()


def test_callbacks_do_as_they_like(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """They leave, read the rest of the text, ask for more, close: the thread goes on."""
    rest: list[str] = []
    more: list[PendingCompletion] = []
    with Scheduler(model, max_batch_size=4) as scheduler:

        def leave(_: object) -> None:
            raise SystemExit(1)

        def ask(_: object) -> None:
            more.append(scheduler.submit("The", max_new_tokens=2))

        pending = [scheduler.submit("Once upon a time", max_new_tokens=5) for _ in range(4)]
        pending[0].add_done_callback(leave)
        pending[1].add_done_callback(leave)
        pending[2].add_done_callback(lambda future: rest.extend(future))  # type: ignore[arg-type]
        pending[3].add_done_callback(ask)
        for one in pending:
            assert (
                one.result(timeout=60).text
                == model.generate("Once upon a time", max_new_tokens=5).text
            )
        wait_for(lambda: bool(more) and bool(rest))
        assert "".join(rest) == pending[2].result().text
        assert more[0].result(timeout=60).text
        pending[0].add_done_callback(lambda _: scheduler.close(cancel=True))
    assert caplog.text.count("a callback of a request failed") <= 2


def test_the_thread_does_not_wait_for_itself(model: Model) -> None:
    with Scheduler(model, max_batch_size=2) as scheduler:

        def wait(how: Callable[[PendingCompletion], object]) -> PendingCompletion:
            def should_stop() -> bool:
                how(scheduler.submit("A", max_new_tokens=2))
                return True

            return scheduler.submit("The", max_new_tokens=5, should_stop=should_stop)

        for how in (lambda p: p.result(), lambda p: p.exception(), lambda p: next(p)):
            with pytest.raises(NeoError, match="waits for a request that this thread"):
                wait(how).result(timeout=60)
        scheduler.close()


def test_nothing_of_a_finished_request_is_kept(model: Model) -> None:
    class Deadline:
        def __call__(self) -> bool:
            return False

    with Scheduler(model, max_batch_size=2, max_length=64) as scheduler:
        deadline = Deadline()
        gone = weakref.ref(deadline)
        before = model.cache_bytes_in_use
        prefix = model.prefix("Once upon")
        pending = scheduler.submit("a", max_new_tokens=3, should_stop=deadline, prefix=prefix)
        pending.result(timeout=60)
        del deadline, prefix
        wait_for(lambda: scheduler.active == 0)
        wait_for(lambda: gc.collect() >= 0 and gone() is None)
        assert model.cache_bytes_in_use == before


def test_errors_are_not_shared(model: Model, monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    steps.go_on.clear()
    monkeypatch.setattr(BoundCall, "run", lambda _: (_ for _ in ()).throw(NeoError("no disk")))
    with Scheduler(model, max_batch_size=2) as scheduler:
        pending = [scheduler.submit("The", max_new_tokens=2) for _ in range(2)]
        wait_for(lambda: scheduler.active > 0)
        steps.go_on.set()
        errors = [one.exception(timeout=60) for one in pending]
    assert errors[0] is not errors[1]
    assert [str(error) for error in errors] == ["no disk"] * 2
    assert [type(error) for error in errors] == [NeoError] * 2


def test_the_callers_array_may_change(model: Model, steps: Steps) -> None:
    ids = np.array([5, 6, 7])
    expected = model.generate([5, 6, 7], max_new_tokens=5).token_ids
    steps.go_on.clear()
    with Scheduler(model, max_batch_size=1) as scheduler:
        first = scheduler.submit("The", max_new_tokens=2)
        pending = scheduler.submit(ids, max_new_tokens=5)
        ids[:] = 9
        steps.go_on.set()
        first.result(timeout=60)
        assert pending.result(timeout=60).token_ids == expected
        assert pending.result().prompt_token_ids == (5, 6, 7)


def test_a_long_prompt_is_read_beside_the_others(mini_bundle: Path, steps: Steps) -> None:
    """A chunk between two steps, in a cache of its own; what comes after it may begin."""
    ids = [7 + n % 50 for n in range(100)]
    with neo_runtime.load(mini_bundle, threads=1, prefill_chunk=30) as model:
        expected = model.generate(ids, max_new_tokens=6, ignore_eos=True).token_ids
        with (
            model.prefix(ids[:50]) as prefix,
            Scheduler(model, max_batch_size=3, max_length=128) as scheduler,
        ):
            del steps.prefilled[:], steps.decoded[:]
            steps.go_on.clear()
            first = scheduler.submit([5, 6], max_new_tokens=20, ignore_eos=True)
            wait_for(lambda: scheduler.active > 0)
            long = scheduler.submit(ids, max_new_tokens=6, ignore_eos=True)
            short = scheduler.submit([5, 6, 7], max_new_tokens=4, ignore_eos=True)
            steps.go_on.set()
            assert long.result(timeout=60).token_ids == expected
            assert len(short.result(timeout=60).token_ids) == 4
            assert len(first.result(timeout=60).token_ids) == 20
            assert steps.prefilled == [[2], [30], [3], [30], [30], [10]]
            assert steps.decoded[:5] == [1, 1, 2, 2, 2]
            behind = scheduler.submit(ids[50:], max_new_tokens=6, ignore_eos=True, prefix=prefix)
            assert behind.result(timeout=60).token_ids == expected
            stopped = scheduler.submit(ids, max_new_tokens=6, should_stop=lambda: True)
            assert stopped.result(timeout=60).finish_reason == "cancelled"
            wait_for(lambda: scheduler.active == 0)
            held = model.cache_bytes_in_use
        assert held > model.cache_bytes_in_use == 0
    size = 3
    with neo_runtime.load(mini_bundle, threads=1) as loaded:
        room = loaded.cache_bytes(size, 128)
    with (
        neo_runtime.load(mini_bundle, threads=1, prefill_chunk=30, max_cache_bytes=room) as model,
        Scheduler(model, max_length=128) as scheduler,
    ):
        assert model.cache_bytes_in_use == loaded.cache_bytes(2, 128), "16, halved until it fits"
        spare = model.new_cache(1, 64)  # no room for another one
        assert (
            scheduler.submit(ids, max_new_tokens=6, ignore_eos=True).result(timeout=60).token_ids
            == expected
        )
        spare.close()


@pytest.mark.parametrize("cancels", [True, False])
def test_a_long_prompt_is_not_read_on_for_nobody(
    cancels: bool, mini_bundle: Path, steps: Steps
) -> None:
    left = threading.Event()
    with (
        neo_runtime.load(mini_bundle, threads=1, prefill_chunk=30) as model,
        Scheduler(model, max_batch_size=2, max_length=256) as scheduler,
    ):
        held = model.cache_bytes_in_use
        steps.go_on.clear()
        long = scheduler.submit([5] * 200, max_new_tokens=3, should_stop=left.is_set)
        wait_for(lambda: scheduler.active > 0)
        assert not cancels or long.cancel()
        left.set()
        steps.go_on.set()
        wait_for(lambda: scheduler.active == scheduler.unfinished == 0)
        assert model.cache_bytes_in_use == held, "its cache is given back"
        assert cancels or long.result(timeout=60).finish_reason == "cancelled"
    assert steps.prefilled in ([], [[30]])


def test_many_wait(model: Model, steps: Steps) -> None:
    """They are not all looked at for each token."""
    asked = count()
    steps.go_on.clear()
    with Scheduler(model, max_batch_size=1) as scheduler:
        first = scheduler.submit("The", max_new_tokens=60, ignore_eos=True)
        waiting = [
            scheduler.submit("A", max_new_tokens=1, should_stop=lambda: next(asked) < 0)
            for _ in range(300)
        ]
        gone = scheduler.submit("B", max_new_tokens=1)
        assert gone.cancel()
        steps.go_on.set()
        first.result(timeout=60)
        assert next(asked) < 300 * 30
        assert all(len(one.result(timeout=120).token_ids) == 1 for one in waiting)


def test_signal_handlers_may_close(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a submit: nothing is locked, and every future ends."""
    scheduler = Scheduler(model, max_batch_size=1)
    put = scheduler._batch._inbox.put
    closed = count()

    class Interrupted:
        def put(self, item: Any) -> None:
            if item is not None and next(closed) == 0:
                scheduler.close(cancel=True)
            put(item)

        def __getattr__(self, name: str) -> Any:
            return getattr(inbox, name)

    inbox = scheduler._batch._inbox
    monkeypatch.setattr(scheduler._batch, "_inbox", Interrupted())
    pending = scheduler.submit("The", max_new_tokens=2)
    with pytest.raises(NeoError, match="scheduler is closed"):
        pending.result(timeout=60)


def test_what_comes_while_it_stops_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the thread's last look at its inbox and its end."""
    scheduler = Scheduler(model, max_batch_size=1)
    batch = scheduler._batch
    drop = batch._drop_caches
    [row] = make_rows(model, np.array([5]), model.defaults, 4, 0)
    late = Request(row, lambda: False)

    def meanwhile() -> None:
        drop()
        batch._inbox.put(late)

    monkeypatch.setattr(batch, "_drop_caches", meanwhile)
    scheduler.close()
    with pytest.raises(NeoError, match="scheduler is closed"):
        late.pending.result(timeout=60)


def test_a_late_submit_is_refused(mini_bundle: Path) -> None:
    """After the interpreter has begun to end, too; a blocked callback does not hold it up long."""
    code = (
        "import atexit, sys\n"
        "def late():\n"
        "    try: scheduler.submit('The')\n"
        "    except neo_runtime.NeoError as error: print(error)\n"
        "atexit.register(late)\n"
        "import neo_runtime, neo_runtime.scheduling.scheduler as module, threading\n"
        "module._PATIENCE = 0.5\n"
        "model = neo_runtime.load(sys.argv[1], threads=1)\n"
        "scheduler = neo_runtime.Scheduler(model, max_batch_size=2)\n"
        "inside, never = threading.Event(), threading.Event()\n"
        "scheduler.submit('Tom', should_stop=lambda: (inside.set(), never.wait()))\n"
        "inside.wait()\n"
    )
    ran = run(code, mini_bundle)
    assert ran.returncode == 0
    assert "the scheduler is closed; make another one" in ran.stdout
    assert "a scheduler's thread does not end" in ran.stderr


def test_a_reader_that_leaves_early(model: Model) -> None:
    with Scheduler(model, max_batch_size=1, max_length=400) as scheduler:
        options: dict[str, Any] = {"max_new_tokens": 380, "ignore_eos": True}
        with scheduler.submit("Once", **options) as pending:
            for piece in pending:
                assert piece
                break
        assert pending.cancelled()
        assert scheduler.submit("Once", max_new_tokens=2).result(timeout=60).text
        assert scheduler.unfinished == 0
        with scheduler.submit("Once", max_new_tokens=5) as whole:
            text = "".join(whole)
        assert whole.result().text == text


def test_a_group_shares_the_batch_as_one(model: Model) -> None:
    """Whose share is smaller is next; among equals who came first."""
    ended: list[str] = []
    groups = ["crowd"] * 6 + ["one", None, "two", None]
    with Scheduler(model, max_batch_size=2) as scheduler:
        with holding(scheduler, "a", max_new_tokens=1):
            for number, group in enumerate(groups):
                pending = scheduler.submit("a", max_new_tokens=4, ignore_eos=True, group=group)
                name = f"{group}{number}"
                pending.add_done_callback(lambda _, name=name: ended.append(name))
        scheduler.close()
    pairs = [set(ended[start : start + 2]) for start in range(0, 10, 2)]
    beside = ["one6", "None7", "two8", "None9", "crowd5"]
    assert pairs == [{f"crowd{turn}", other} for turn, other in enumerate(beside)]


def test_a_group_has_a_hash(model: Model) -> None:
    """Found by the caller: in the scheduler's thread it would fail for all."""
    groups: list[tuple[str, Any]] = [("list", []), ("tuple", ("client", []))]
    with Scheduler(model, max_batch_size=2) as scheduler:
        good = scheduler.submit("a", max_new_tokens=4, ignore_eos=True)
        for kind, group in groups:
            with pytest.raises(RequestError, match=f"group is of type {kind}, expected a hashable"):
                scheduler.submit("a", max_new_tokens=2, group=group)
        assert len(good.result(timeout=60).token_ids) == 4
        assert scheduler.unfinished == 0


def test_groups_that_cannot_be_compared(model: Model, steps: Steps) -> None:
    """It is the scheduler's thread that finds out, and nobody is to wait for ever."""

    class Odd:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError("compared")

    with Scheduler(model, max_batch_size=3) as scheduler:
        steps.go_on.clear()
        running = scheduler.submit("The", max_new_tokens=30, ignore_eos=True)
        wait_for(lambda: scheduler.active == 1)
        bad = [scheduler.submit("a", max_new_tokens=2, group=Odd()) for _ in range(3)]
        steps.go_on.set()
        for one in (running, *bad):
            with pytest.raises(ZeroDivisionError, match="compared"):
                one.result(timeout=60)
        assert scheduler.unfinished == scheduler.waiting == 0
        again = scheduler.submit("a", max_new_tokens=4, ignore_eos=True)
        assert len(again.result(timeout=60).token_ids) == 4


def test_what_is_told_of_a_batch(model: Model) -> None:
    with Scheduler(model, max_batch_size=3) as scheduler:
        assert (scheduler.max_batch_size, scheduler.generated_tokens) == (3, 0)
        given_up = scheduler.submit("a", max_new_tokens=300, ignore_eos=True)
        next(given_up)
        given_up.cancel()
        whole = scheduler.submit("a", max_new_tokens=5, ignore_eos=True)
        completion = whole.result()
        wait_for(lambda: scheduler.unfinished == 0)
        assert scheduler.generated_tokens > 5
    assert whole.queue_seconds is not None
    assert whole.time_to_first_token == pytest.approx(completion.timings.time_to_first_token, 0.5)
    assert 0 <= whole.queue_seconds < whole.time_to_first_token
    assert given_up.time_to_first_token is not None
    with Scheduler(model) as scheduler, holding(scheduler, "a", max_new_tokens=2):
        waiting = scheduler.submit("a", max_new_tokens=2)
        waiting.cancel()
    assert waiting.queue_seconds is None
    assert waiting.time_to_first_token is None


def test_who_has_the_text_finds_its_tokens_counted(model: Model) -> None:
    with Scheduler(model, max_batch_size=2) as scheduler:
        counted: list[int] = []

        def count_them(_: object) -> None:
            counted.append(scheduler.generated_tokens)

        for _ in range(3):
            pending = scheduler.submit("a", max_new_tokens=4, ignore_eos=True)
            pending.add_done_callback(count_them)
            pending.result()
        wait_for(lambda: len(counted) == 3)
    assert counted == [4, 8, 12]
